"""Conversations rendered to text by a Jinja template."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gemma_deploy.errors import TokenizerError
from gemma_deploy.limits import MAX_TEMPLATE_CHARACTERS
from gemma_deploy.quoting import shortened_text
from gemma_deploy.tokenizer.control_marks import ControlMarks, unused_characters
from gemma_deploy.tokenizer.control_tokens import ControlTokens
from gemma_deploy.tokenizer.conversation import Conversation
from gemma_deploy.tokenizer.template_environment import compiled, names_in

if TYPE_CHECKING:
    from jinja2 import Template

# Gemma's turns. The system message goes before the first user turn's text, as Gemma 3 has it.
DEFAULT_CHAT_TEMPLATE: Final = """\
{{- bos_token -}}
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for part in content -%}
            {{- part.text | trim -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools or messages | selectattr('tool_calls') | list -%}
    {{- raise_exception('it has no place for tools') -}}
{%- endif -%}
{%- set system = messages[0].role == 'system' -%}
{%- set turns = messages[1:] if system else messages -%}
{%- if not turns -%}
    {{- raise_exception('a system message needs a user message after it') -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message.role != ('user' if loop.index0 is even else 'assistant') -%}
        {{- raise_exception('roles must alternate user, assistant, user, ... after an optional system message, but message ' ~ (loop.index + system) ~ ' is from "' ~ message.role ~ '"') -}}
    {%- endif -%}
    {{- '<start_of_turn>' ~ ('model' if message.role == 'assistant' else 'user') ~ '\\n' -}}
    {%- if loop.first and system -%}
        {{- (messages[0].content if messages[0].content is string else text(messages[0].content)) ~ '\\n\\n' -}}
    {%- endif -%}
    {{- text(message.content) ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


class ChatTemplate:
    """A Jinja template for conversations, compiled when it is first used.

    Rendering is sandboxed: a template reaches nothing but what it is given, and can spend no more than
    some seconds and some hundred megabytes (more for long conversations). Names and whitespace behave as in transformers: `messages`, `tools`,
    `add_generation_prompt`, the special tokens, `raise_exception`, `strftime_now`, the filter
    `tojson`, `{% break %}`, `{% generation %}`. Safe to share between threads: what is made when it
    is first needed is the same whichever thread makes it.

    Args:
        source: Jinja source; None for Gemma's turns, where roles alternate between user and
            assistant and a system message is put before the first user turn's text, as Gemma 3
            does (the templates of Gemma 1 and 2 refuse it).
        named_tokens: What the template sees as `bos_token`, `eos_token`, ...
        control_tokens: What `marked` marks.
    """

    def __init__(
        self, source: str | None, named_tokens: Mapping[str, str], control_tokens: ControlTokens
    ) -> None:
        if source is not None and len(source) > MAX_TEMPLATE_CHARACTERS:
            raise TokenizerError(
                f"The checkpoint's chat template has {len(source):,} characters; expected at most "
                f"{MAX_TEMPLATE_CHARACTERS:,}. Use the original model's, as chat_template.jinja."
            )
        self.is_default = source is None
        self._source = DEFAULT_CHAT_TEMPLATE if source is None else source
        self._named_tokens = named_tokens
        self._control_tokens = control_tokens

    def render(self, conversation: Conversation) -> str:
        """Return a conversation as text.

        Raises:
            TokenizerError: The template is broken, or refuses the conversation.
        """
        with self._failing():
            return _text(self._plain, conversation)

    def marked(self, used: set[str]) -> tuple[ControlMarks, Callable[[Conversation], str]]:
        """Return the template with marks for the control tokens that it spells.

        Args:
            used: Characters that cannot be marks: those of conversations to be rendered.

        Returns:
            The marks, to which others can be added, and what renders a conversation with them.

        Raises:
            TokenizerError: `used` leaves too few characters; or, on rendering, as `render`.
        """
        with self._failing():
            variant = self._usually_marked
            if not used.isdisjoint(variant.marks.values()):
                variant = self._variant(ControlMarks(self._control_tokens, {*used, *self._source}))

        def render(conversation: Conversation) -> str:
            with self._failing():
                return _text(variant, conversation)

        return ControlMarks(self._control_tokens, used, variant.marks), render

    @cached_property
    def names(self) -> frozenset[str]:
        """The strings and attributes that the template spells, such as keys that it looks up."""
        return names_in(self._source)

    @cached_property
    def _plain(self) -> "_Variant":
        return _Variant(compiled(self._source), self._named_tokens, {})

    @cached_property
    def _usually_marked(self) -> "_Variant":
        return self._variant(ControlMarks(self._control_tokens, set(self._source)))

    def _variant(self, marks: ControlMarks) -> "_Variant":
        template = compiled(self._source, marks.marked)
        named = {role: marks.marked(token) for role, token in self._named_tokens.items()}
        return _Variant(template, named, marks.by_token)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except TokenizerError:
            raise
        except Exception as err:  # a template is other people's code: it can fail in any way
            reason = shortened_text(str(err).removesuffix("."), 500)
            whose = "Gemma's chat template" if self.is_default else "The checkpoint's chat template"
            raise TokenizerError(
                f"{whose} cannot be applied to these messages: {reason}. Expected messages in the "
                "form that the template supports; change them, or the template in "
                "chat_template.jinja."
            ) from err


class _Variant(NamedTuple):
    """A compiled template with what it sees as special tokens, and the marks in both."""

    template: "Template"
    named_tokens: Mapping[str, str]
    marks: Mapping[str, str]


def _text(variant: _Variant, conversation: Conversation) -> str:
    if not conversation.continue_final_message:
        return _rendered(variant, conversation)
    # What a template does to whitespace at the end of a message (it trims it, or not) shows in the
    # space behind the stop.
    stop = next(unused_characters({*conversation.characters(), *variant.marks.values()}))
    *before, last = conversation.messages
    text = _rendered(
        variant, replace(conversation, messages=[*before, _extended(last, stop + " ")])
    )
    head, found, tail = text.rpartition(stop)
    if not found:
        raise TokenizerError(
            "The chat template leaves out the end of the last message, so it cannot be continued; "
            "expected one that writes it as it is. Set continue_final_message=False."
        )
    return head if tail.startswith(" ") else head.rstrip()


def _extended(message: Mapping[str, Any], ending: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + ending}
    *before, part = content
    return {**message, "content": [*before, {**part, "text": part["text"] + ending}]}


def _rendered(variant: _Variant, conversation: Conversation) -> str:
    return variant.template.render(
        messages=conversation.messages,
        tools=conversation.tools,
        documents=None,
        add_generation_prompt=conversation.add_generation_prompt,
        **variant.named_tokens,
    )

"""Conversations rendered to text by a Jinja template."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from gemma_deploy.errors import TokenizerError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

# Gemma's turns. The system message goes before the first user turn's text, as Gemma 3 has it.
DEFAULT_CHAT_TEMPLATE: Final = """\
{{- bos_token -}}
{%- macro text(content) -%}
    {%- if content is string -%}
        {{- content | trim -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type != 'text' -%}
                {{- raise_exception('a content part of type "' ~ part.type ~ '"; only text is supported') -}}
            {%- endif -%}
            {{- part.text | trim -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
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

_ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")


class ChatTemplate:
    """A Jinja template for conversations, compiled when it is first used.

    Rendering is sandboxed: templates come with checkpoints and are other people's code. Names and
    whitespace behave as in transformers: `messages`, `add_generation_prompt`, the special tokens,
    `raise_exception`, `strftime_now`, the filter `tojson`, `{% break %}`, `{% generation %}`.

    Args:
        source: Jinja source; None for Gemma's turns, where roles alternate between user and
            assistant and a system message is put before the first user turn's text, as Gemma 3
            does (the templates of Gemma 1 and 2 refuse it).
        named_tokens: What the template sees as `bos_token`, `eos_token`, ...
    """

    def __init__(self, source: str | None, named_tokens: Mapping[str, str]) -> None:
        self.is_default = source is None
        self._source = DEFAULT_CHAT_TEMPLATE if source is None else source
        self._named_tokens = dict(named_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, tools: Any = None) -> str:
        """Return the conversation as text.

        Args:
            messages: As `plain_messages` returns them.
            add_generation_prompt: Whether the text ends with the opening of the model's turn.

        Raises:
            TokenizerError: The template is broken, or refuses the conversation.
        """
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                documents=None,
                **self._named_tokens,
            )
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as err:
            reason = str(err).removesuffix(".")
            whose = "Gemma's chat template" if self.is_default else "The checkpoint's chat template"
            raise TokenizerError(
                f"{whose} cannot be applied to these messages: {reason}. Expected messages in the "
                "form that the template supports; change them, or the template in "
                "chat_template.jinja."
            ) from err

    @cached_property
    def _template(self) -> "Template":
        return _environment().from_string(self._source)


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check messages, and copy them as plain JSON values.

    Nothing but plain values reaches a template: methods of richer objects would be callable from
    its sandbox. The role "model", as Gemma calls it, becomes "assistant".

    Raises:
        TokenizerError: There are no messages, or one is malformed or has an unknown role.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TokenizerError(
            f"messages is a {type(messages).__name__}; expected a list of "
            '{"role": ..., "content": ...}.'
        )
    if not messages:
        raise TokenizerError("There are no messages; expected at least one from the user.")
    return [_plain_message(message, number) for number, message in enumerate(messages, 1)]


def _plain_message(message: object, number: int) -> dict[str, Any]:
    plain = _plain(message, number)
    if not isinstance(plain, dict) or not {"role", "content"} <= plain.keys():
        raise TokenizerError(
            f'Message {number} is {message!r}; expected an object with "role" and "content".'
        )
    if plain["role"] == "model":
        plain["role"] = "assistant"
    if plain["role"] not in _ROLES:
        raise TokenizerError(
            f"Message {number} has the role {plain['role']!r}; expected one of {', '.join(_ROLES)}."
        )
    content = plain["content"]
    is_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    if not isinstance(content, str) and not is_parts:
        raise TokenizerError(
            f"Message {number} has a content of type {type(content).__name__}; expected a string, "
            'or a list of {"type": "text", "text": ...}.'
        )
    return plain


def _plain(value: object, number: int) -> Any:
    # Exact types: a subclass of str could bring methods of its own.
    if value is None or type(value) in {str, bool, int, float}:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, number) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, number) for item in value]
    raise TokenizerError(
        f"Message {number} holds a {type(value).__name__}; expected only what JSON has: strings, "
        "numbers, booleans, null, lists and objects."
    )


def _environment() -> "Environment":
    """Return the sandbox, set up as transformers sets up its own."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Chat templates make text for a model, not HTML: nothing is to be escaped.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        extensions=[loopcontrols, _generation_extension()],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _generation_extension() -> Any:
    """Return the extension for `{% generation %}` blocks, which mark what a model wrote.

    They matter to training only; here their body is rendered as if the tags were not there.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance attribute

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002  templates may pass it by this name
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )

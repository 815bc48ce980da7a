"""Keeping control tokens that users type apart from those that a chat template writes."""

import dataclasses
import re
from array import array
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final, TypeAlias

from gemma_deploy.errors import TokenizerError
from gemma_deploy.quoting import shortened_text
from gemma_deploy.tokenizer.chat_template import ChatTemplate
from gemma_deploy.tokenizer.control_marks import Rendering
from gemma_deploy.tokenizer.control_tokens import ControlTokens, normalized, split_at
from gemma_deploy.tokenizer.conversation import Conversation

_Render: TypeAlias = Callable[[Conversation], Rendering]

# What a conversation has whatever the template looks up.
_OTHER_DIGITS: Final = str.maketrans("0123456789", "1234567898")
_KEYS: Final = frozenset({"role", "content", "type", "text"})
# Values of "type" that templates compare: of tool calls, text parts and JSON schemas.
_TYPES: Final = frozenset(
    {"array", "boolean", "function", "integer", "null", "number", "object", "string", "text"}
)


def guarded_pieces(
    conversation: Conversation,
    template: ChatTemplate,
    control_tokens: ControlTokens,
    framing: Collection[str],
) -> list[str]:
    """Render a conversation into pieces of text that are safe to encode one after the other.

    The pieces joined are the rendered text. It is cut only inside control tokens that are, in part
    at least, a user's; where there are none, it is one piece.

    To tell whose a control token is, the template is rendered once more with its own tokens, and
    those of the assistant's contents, replaced by private-use characters. What is not behind one of
    them is text, however the template changed a message. Two kinds of templates need more:

    - Some put tokens together from parts (`'<|' ~ message.role ~ '|>'`). They do so around neutral
      messages too, in which private-use characters stand for all that users wrote.
    - Some look into their own tokens (their length, where they begin), so that the marks change the
      text. Then all that the template writes around neutral messages is taken as its own.

    Where they write the same around the messages as around neutral ones, position by position, each
    token's place tells whose it is. Else no token may be anywhere but in what is written around.

    Args:
        conversation: Its contents as the template reads them.
        template: What renders it.
        control_tokens: What only the template and the assistant may write.
        framing: Those that the assistant may not write either, as they end or begin a turn: no
            answer holds them, but one that repeats a user's words can.

    Raises:
        TokenizerError: The template fails; or the text holds control tokens of which the template
            does not let tell whether they are its own.
    """
    plain = template.render(conversation)
    if not control_tokens.found(plain):
        return [plain]
    *renders, filler = _renders(conversation, template, framing, set(plain))
    render, real = next(
        (
            (render, real)
            for render in renders
            if (real := _rendering_or_none(render, conversation)) is not None and real.text == plain
        ),
        (None, None),
    )
    if render is None or real is None:  # a template that writes the time, or at random
        raise _undecided(control_tokens.found(plain))
    if not any(_cuts(real, control_tokens)):
        return [plain]
    masking = _Masking(filler, template.names, control_tokens, framing)
    neutral = _rendering_or_none(render, masking.masked(conversation))
    if neutral is None:
        raise _undecided(control_tokens.found(plain))
    composed = sorted(set(control_tokens.matches(neutral.text)) - set(neutral.own))
    if not composed or _is_aligned(real, neutral, filler):
        own = [*real.own, *composed]
        return split_at(plain, sorted(set(_cuts(Rendering(plain, own), control_tokens))))
    outside = _outside_of_frame(plain, neutral.text, filler, control_tokens)
    if outside:
        raise _undecided(outside)
    return [plain]


def _outside_of_frame(
    text: str, neutral: str, filler: str, control_tokens: ControlTokens
) -> list[str]:
    """Return the control tokens of a text that are not where the template writes around messages.

    What it writes around neutral ones must be in the text, in the same order and to the end, with
    anything between. All tokens are returned where it is not.
    """
    everywhere = control_tokens.found(text)
    covered = bytearray(len(text))
    position = 0
    *parts, last = re.split(rf"{filler}[{filler}\s]*", neutral)
    for number, part in enumerate(map(str.rstrip, parts)):
        start = text.find(part, position)
        if start < 0 or (number == 0 and start > 0):
            return everywhere
        position = start + len(part)
        covered[start:position] = b"\1" * len(part)
    start = len(text) - len(last)
    if start < position or not text.endswith(last):
        return everywhere
    covered[start:] = b"\1" * len(last)
    return [
        normalized(text[start:end])
        for start, end in control_tokens.spans(text)
        if not all(covered[start:end])
    ]


def _renders(
    conversation: Conversation, template: ChatTemplate, framing: Collection[str], used: set[str]
) -> tuple[_Render, _Render, str]:
    """Return what renders with marks and what renders without, and a character that is not used."""
    marks, render_marked = template.marked(conversation.characters() | used)

    def with_marks(conversation: Conversation) -> Rendering:
        marked = conversation.with_answers(lambda text: marks.marked(text, framing))
        return marks.restored(render_marked(marked))

    def without_marks(conversation: Conversation) -> Rendering:
        return Rendering(template.render(conversation), [])

    return with_marks, without_marks, marks.unused()


def _rendering_or_none(render: _Render, conversation: Conversation) -> Rendering | None:
    try:
        return render(conversation)
    except TokenizerError:
        return None


def _cuts(rendering: Rendering, control_tokens: ControlTokens) -> Iterator[int]:
    """Yield where to cut a text so that encoding finds no control tokens but its own ones."""
    own_end = array("Q", bytes(8 * len(rendering.text)))  # by position; 0 elsewhere
    for start, end in rendering.own:
        own_end[start:end] = array("Q", [end]) * (end - start)
    for start, end in control_tokens.spans(rendering.text):
        if not own_end[start]:
            yield start + 1
        elif end > own_end[start]:
            yield own_end[start]


def _is_aligned(real: Rendering, neutral: Rendering, filler: str) -> bool:
    """Whether two texts differ in nothing but what users wrote."""
    return (
        real.own == neutral.own
        and len(real.text) == len(neutral.text)
        and all(b in {a, filler} for a, b in zip(real.text, neutral.text, strict=True))
    )


def _undecided(tokens: list[str]) -> TokenizerError:
    found = shortened_text(", ".join(dict.fromkeys(tokens)), 200)
    return TokenizerError(
        f"The conversation's text holds control tokens ({found}), and the checkpoint's chat template "
        "changes what it is given in a way that does not let tell them from its own; expected "
        "messages that spell no control tokens, in part or in whole. Remove them from the messages."
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Masking:
    """Puts a filler in place of all that users wrote, character by character.

    What stays: whitespace, which templates trim and split at; roles and types, which are of a few
    kinds; keys that the template spells, unless they are control tokens; control tokens that the
    assistant may write.

    Attributes:
        filler: A character that occurs nowhere else.
        names: The strings that the template spells.
        control_tokens: What users may not write.
        framing: What the assistant may not write either.
    """

    filler: str
    names: Collection[str]
    control_tokens: ControlTokens
    framing: Collection[str]

    def masked(self, conversation: Conversation) -> Conversation:
        """Return a neutral copy of a conversation."""
        return dataclasses.replace(
            conversation,
            messages=[self._message(message) for message in conversation.messages],
            tools=self._value(conversation.tools, self._hidden),
        )

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        answer = self._answer if message["role"] == "assistant" else self._hidden
        return {
            self._key(key): value
            if key == "role"
            else self._value(value, answer if key == "content" else self._hidden)
            for key, value in message.items()
        }

    def _value(self, value: Any, change: Callable[[str], str]) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, list):
            return [self._value(item, change) for item in value]
        if isinstance(value, dict):
            return {
                self._key(key): item
                if key == "type" and isinstance(item, str) and item in _TYPES
                else self._value(item, change if key == "text" else self._hidden)
                for key, item in value.items()
            }
        if isinstance(value, int | float) and not isinstance(value, bool):
            # As many other digits: a template may put a token together around a number.
            kind = int if isinstance(value, int) else float
            return kind(repr(kind(value)).translate(_OTHER_DIGITS))
        return value

    def _key(self, key: str) -> str:
        is_kept = key in _KEYS or (key in self.names and not self.control_tokens.found(key))
        return key if is_kept else self._hidden(key)

    def _hidden(self, text: str) -> str:
        return re.sub(r"\S", self.filler, text)

    def _answer(self, text: str) -> str:
        pieces = []
        position = 0
        for start, end in self.control_tokens.matches(text):
            if normalized(text[start:end]) not in self.framing:
                pieces += [self._hidden(text[position:start]), text[start:end]]
                position = end
        return "".join([*pieces, self._hidden(text[position:])])

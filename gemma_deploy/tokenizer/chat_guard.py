"""Keeping control tokens that users type apart from those that a chat template writes."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any, TypeAlias

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer.control_tokens import ControlTokens, split_at

Render: TypeAlias = Callable[[list[dict[str, Any]]], str]

# Where users' text is. Other strings ("type", "role", names) are compared by templates, and are
# marked only where they spell a control token.
_TEXT_KEYS = frozenset({"content", "text"})
_PRIVATE_USE = range(0xE000, 0xF900)


def guarded_pieces(
    messages: list[dict[str, Any]], render: Render, control_tokens: ControlTokens
) -> list[str]:
    """Render messages into pieces of text that are safe to encode one after the other.

    The pieces joined are the rendered text. It is cut only inside a control token that is, in
    part at least, not the template's; where there is none, it is one piece.

    To tell whose a control token is, the messages are rendered once more with marks in them: a
    private-use character inside each control token of theirs, and at both ends of each text (its
    surrounding whitespace stays outside, as templates trim it). A control token with a mark in it
    is then not the template's.

    Args:
        messages: As `plain_messages` returns them.
        render: Messages to text.
        control_tokens: What only the template may write.

    Raises:
        TokenizerError: The template fails; or it looks into contents, so that marks change what it
            renders, while a content spells a control token.
    """
    plain = render(messages)
    mark = _unused_character(json.dumps(messages, ensure_ascii=False) + plain)
    marked = render([_marked(message, mark, control_tokens) for message in messages]).split(mark)
    of_plain = control_tokens.matches(plain)
    of_template = [token for piece in marked for token in control_tokens.matches(piece)]
    if of_plain == of_template:
        return [plain]
    if "".join(marked) != plain:
        foreign = ", ".join((Counter(of_plain) - Counter(of_template)) or of_plain)
        raise TokenizerError(
            f"A message contains a control token (one of: {foreign}), and the checkpoint's chat "
            "template looks into contents, so the token cannot be kept as plain text. Remove it "
            "from the message."
        )
    inside = {at for start, end in control_tokens.spans(plain) for at in range(start + 1, end)}
    marks = accumulate(len(piece) for piece in marked[:-1])
    return split_at(plain, [at for at in marks if at in inside])


def _unused_character(text: str) -> str:
    used = set(text)
    for code in _PRIVATE_USE:
        if chr(code) not in used:
            return chr(code)
    raise TokenizerError(
        "The messages use every private-use character from U+E000 to U+F8FF; expected text that "
        "leaves at least one of them out. Remove some."
    )


def _marked(value: Any, mark: str, control_tokens: ControlTokens, *, is_text: bool = False) -> Any:
    """Return a copy of a message, or of what is in one, with marks."""
    if isinstance(value, str):
        cuts = set(control_tokens.cuts(value))
        if is_text and (core := value.strip()):
            start = value.index(core)
            cuts |= {start, start + len(core)}
        return mark.join(split_at(value, sorted(cuts)))
    if isinstance(value, list):
        return [_marked(item, mark, control_tokens, is_text=is_text) for item in value]
    if isinstance(value, dict):
        return {
            _marked(key, mark, control_tokens): _marked(
                item, mark, control_tokens, is_text=key in _TEXT_KEYS
            )
            for key, item in value.items()
        }
    return value

"""Characters that stand for control tokens while a chat template is rendered."""

from collections.abc import Collection, Container, Iterator, Mapping
from itertools import chain
from typing import Final, NamedTuple

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer.control_tokens import ControlTokens, normalized

_PRIVATE_USE: Final = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))


class Rendering(NamedTuple):
    """Rendered text, and which of its control tokens were marked.

    Attributes:
        text: With the tokens in place of their marks.
        own: (start, end) of each of those tokens, ascending.
    """

    text: str
    own: list[tuple[int, int]]


class ControlMarks:
    """Replaces control tokens by private-use characters, one for each, and back.

    Args:
        control_tokens: What is replaced.
        used: Characters that cannot be marks, as the texts to be marked use them.
        marks: Marks that are in use already, by token.
    """

    def __init__(
        self,
        control_tokens: ControlTokens,
        used: Collection[str],
        marks: Mapping[str, str] | None = None,
    ) -> None:
        self._control_tokens = control_tokens
        self._by_token = dict(marks or {})
        self._unused = unused_characters({*used, *self._by_token.values()})

    @property
    def by_token(self) -> Mapping[str, str]:
        """The mark of each token that was marked so far."""
        return self._by_token

    def unused(self) -> str:
        """Return a character that is neither a mark nor used, another one each time.

        Raises:
            TokenizerError: No private-use character is left.
        """
        return next(self._unused)

    def marked(self, text: str, exempt: Container[str] = ()) -> str:
        """Return `text` with a mark for each control token that encoding would find in it.

        Args:
            text: Any text.
            exempt: Tokens that stay as they are, with U+2581 for spaces.

        Raises:
            TokenizerError: No private-use character is left.
        """
        pieces = []
        position = 0
        for start, end in self._control_tokens.matches(text):
            token = text[start:end]
            if normalized(token) not in exempt:
                if token not in self._by_token:
                    self._by_token[token] = self.unused()
                pieces += [text[position:start], self._by_token[token]]
                position = end
        return "".join([*pieces, text[position:]])

    def restored(self, text: str) -> Rendering:
        """Return a marked text with its tokens back in place, and where they are."""
        by_mark = {mark: token for token, mark in self._by_token.items()}
        pieces: list[str] = []
        own = []
        length = start = 0
        for at, character in enumerate(text):
            if (token := by_mark.get(character)) is not None:
                pieces += [text[start:at], token]
                length += at - start + len(token)
                own.append((length - len(token), length))
                start = at + 1
        return Rendering("".join([*pieces, text[start:]]), own)


def unused_characters(used: Container[str]) -> Iterator[str]:
    """Yield private-use characters that are not among those used.

    Raises:
        TokenizerError: There are no more.
    """
    for character in map(chr, chain.from_iterable(_PRIVATE_USE)):
        if character not in used:
            yield character
    raise TokenizerError(
        "The messages use too many of the private-use characters (U+E000 to U+F8FF, U+F0000 to "
        "U+10FFFD); expected text that leaves some of them out. Remove some."
    )

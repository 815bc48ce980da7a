"""Finding control tokens that text spells out."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

# Markup that Gemma was pretrained on: tokens of their own, and still ordinary text.
_HTML_TAG = re.compile(
    r"</?(?:table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote"
    r"|strong|em|b|i|u|s|sub|sup|code)>"
)
_IN_BRACKETS = re.compile(r"<.+>|\[.+\]", re.DOTALL)


def reads_as_control(content: str) -> bool:
    """Whether an added token that is not flagged special controls the model all the same.

    Which of Gemma's tokens are flagged special differs from release to release (`<start_of_turn>`
    is in some and not in others), so the flag alone does not tell. What stands in brackets counts
    as control (`<start_of_turn>`, `<unused7>`, `[@BOS@]`), except HTML tags; words, runs of
    newlines and runs of spaces are text.
    """
    return bool(_IN_BRACKETS.fullmatch(content)) and not _HTML_TAG.fullmatch(content)


class ControlTokens:
    """The strings that stand for control tokens, and where a text contains them.

    A token can only come out of a piece of text that contains the token's whole string, whether
    the added vocabulary finds it or merges build it. So text that is taken apart inside every
    such string, and encoded piece by piece, cannot produce a control token. A string of one
    character cannot be taken apart: it counts as text.

    Args:
        contents: The strings. Spaces and U+2581 are the same thing here, as Gemma's normalizer
            turns the one into the other.
    """

    def __init__(self, contents: Iterable[str]) -> None:
        self._contents = frozenset(normalized(content) for content in contents if len(content) > 1)
        lengths: defaultdict[str, set[int]] = defaultdict(set)
        for content in self._contents:
            lengths[content[0]].add(len(content))
        self._lengths = {first: sorted(sizes, reverse=True) for first, sizes in lengths.items()}
        firsts = "".join(map(re.escape, self._lengths))
        self._first = re.compile(f"[{firsts}]" if firsts else r"(?!)")

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of the longest control token at each position where one starts.

        Spans may overlap. The time taken does not depend on the number of control tokens (Gemma 3
        has over 6,000), only on the text and on how many different lengths they have.
        """
        text = normalized(text)
        for match in self._first.finditer(text):
            start = match.start()
            for length in self._lengths[match[0]]:
                token = text[start : start + length]  # shorter at the end of the text
                if token in self._contents:
                    yield start, start + len(token)
                    break

    def cuts(self, text: str) -> list[int]:
        """Return the positions, ascending, at which to cut so that no piece holds a control token."""
        return [start + 1 for start, _ in self.spans(text)]

    def matches(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of what encoding `text` would find: leftmost, longest, disjoint."""
        position = 0
        for start, end in self.spans(text):
            if start >= position:
                yield start, end
                position = end

    def found(self, text: str) -> list[str]:
        """Return the control tokens that encoding `text` would find, spaces as U+2581."""
        return [normalized(text[start:end]) for start, end in self.matches(text)]


def split_at(text: str, cuts: Iterable[int]) -> list[str]:
    """Split `text` at ascending positions; the pieces joined are the text again."""
    bounds = [0, *cuts, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def normalized(text: str) -> str:
    """Return text as Gemma's normalizer makes it: U+2581 for spaces."""
    return text.replace(" ", "▁")

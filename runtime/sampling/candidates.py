"""The tokens of one row that may still be chosen, narrowed down without sorting the vocabulary."""

from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

# An array of any library that array-api-compat knows (numpy, torch, ...).
Array = Any

_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Candidates:
    """C tokens in the order of their ids, with their logits.

    Attributes:
        logits: float32 [C].
        token_ids: int64 [C]; None when the candidates are the whole vocabulary.
    """

    logits: Array
    token_ids: Array | None = None

    @classmethod
    def of(cls, logits: Array, token_ids: Array | None = None) -> "Candidates":
        """Return the candidates of logits [C] whose `token_ids` [C] come in any order."""
        if token_ids is None:
            return cls(logits)
        xp = array_namespace(logits)
        order = xp.argsort(token_ids)
        return cls(xp.take(logits, order, axis=0), xp.take(token_ids, order, axis=0))

    def __len__(self) -> int:
        return int(self.logits.shape[0])

    def at_least(self, bound: Array) -> "Candidates":
        """Return the candidates whose logit is `bound` (0-d array) or more."""
        xp = array_namespace(self.logits)
        (kept,) = xp.nonzero(self.logits >= bound)
        token_ids = kept if self.token_ids is None else xp.take(self.token_ids, kept, axis=0)
        return Candidates(xp.take(self.logits, kept, axis=0), token_ids)

    def contenders(self, count: int) -> "Candidates":
        """Return few candidates, among them the `count` highest and all their equals.

        The highest logit of each of several blocks is found in one cheap pass. `count` blocks reach
        the count-th highest of these peaks, so nothing below it can be among the `count` highest.
        Where that saves nothing, the candidates themselves are returned.
        """
        xp = array_namespace(self.logits)
        blocks = len(self) // _BLOCK_TOKENS
        if count >= blocks:
            return self
        # A block is every blocks-th candidate: a maximum along the first axis runs ten times faster.
        whole = self.logits[: blocks * _BLOCK_TOKENS]
        peaks = xp.max(xp.reshape(whole, (_BLOCK_TOKENS, blocks)), axis=0)
        return self.at_least(xp.sort(peaks, stable=False)[blocks - count])

    def token_id(self, index: int) -> int:
        """Return the token id of the candidate at `index`."""
        return index if self.token_ids is None else int(self.token_ids[index])

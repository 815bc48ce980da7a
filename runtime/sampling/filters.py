"""Temperature, top-k and top-p, each a frozen dataclass that narrows or reweighs candidates."""

from dataclasses import dataclass
from typing import Protocol

from array_api_compat import array_namespace

from gemma_deploy.runtime.sampling.candidates import Candidates
from gemma_deploy.runtime.sampling.cumulative import passing_index

_FIRST_TOP_P_TRY = 64
_TOP_P_GROWTH = 8


class Filter(Protocol):
    """Narrows or reweighs the candidates of one row."""

    def __call__(self, candidates: Candidates) -> Candidates:
        """Return the candidates that remain; at least one always does."""
        ...


@dataclass(frozen=True, slots=True)
class Temperature:
    """Divides the logits by `value` (> 0): below 1 the likely get likelier."""

    value: float

    def __call__(self, candidates: Candidates) -> Candidates:
        """Return all candidates, reweighed."""
        return Candidates(candidates.logits / self.value, candidates.token_ids)


@dataclass(frozen=True, slots=True)
class TopK:
    """Keeps the `count` highest candidates, and those equal to the last of them."""

    count: int

    def __call__(self, candidates: Candidates) -> Candidates:
        """Return about `count` candidates."""
        if self.count >= len(candidates):
            return candidates
        xp = array_namespace(candidates.logits)
        near = candidates.contenders(self.count)
        return near.at_least(xp.sort(near.logits, stable=False)[len(near) - self.count])


@dataclass(frozen=True, slots=True)
class TopP:
    """Keeps the fewest likeliest candidates whose probabilities sum to `mass` or more.

    Candidates as likely as the last of them stay too (https://arxiv.org/abs/1904.09751).
    """

    mass: float

    def __call__(self, candidates: Candidates) -> Candidates:
        """Return at least one candidate."""
        xp = array_namespace(candidates.logits)
        peak = xp.max(candidates.logits)
        wanted = self.mass * float(xp.sum(xp.exp(candidates.logits - peak)))
        tried = _FIRST_TOP_P_TRY
        while True:
            near = candidates.contenders(tried)
            descending = xp.flip(xp.sort(near.logits, stable=False), axis=0)
            weights = xp.exp(descending - peak)
            reached = float(xp.sum(weights))
            if reached >= wanted or near is candidates:
                return near.at_least(descending[passing_index(weights, wanted / reached)])
            tried *= _TOP_P_GROWTH

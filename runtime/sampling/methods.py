"""Ways to choose one token per row: `Greedy` and `Sampled`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from array_api_compat import array_namespace

from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sampling.candidates import Array, Candidates
from gemma_deploy.runtime.sampling.draw import draw
from gemma_deploy.runtime.sampling.filters import Filter, Temperature, TopK, TopP


class SamplingMethod(Protocol):
    """Chooses one token for each row of a batch."""

    @property
    def num_candidates(self) -> int | None:
        """How many of the largest logits suffice as a rule (see `is_decided_by`); None for all."""
        ...

    def is_decided_by(self, logits: Array) -> bool:
        """Tell whether a row's largest logits are enough to choose as if all were there.

        Args:
            logits: float32 [C], at least `num_candidates` of them.
        """
        ...

    def __call__(
        self,
        logits: Array,
        uniforms: Iterable[float],
        token_ids: Array | None = None,
        *,
        highest: Sequence[int] | None = None,
    ) -> list[int]:
        """Return B token ids.

        Args:
            logits: float32 [B, C], finite, of any array library.
            uniforms: One random number in [0, 1) per row; what is chosen depends on nothing else.
            token_ids: int64 [B, C], whose logits they are, in any order; None if they are those of
                the whole vocabulary.
            highest: B indexes of the highest logits, as `highest_if_finite` gives them; None where
                they are not known.
        """
        ...


@dataclass(frozen=True, slots=True)
class Greedy:
    """Takes the likeliest token, the lowest id among equals.

    Among equals that were not given, the session that picked the largest logits has chosen.
    """

    @property
    def num_candidates(self) -> int:
        """One: the largest."""
        return 1

    def is_decided_by(self, logits: Array) -> bool:  # noqa: ARG002 - the protocol's; the largest is there
        """Return True."""
        return True

    def __call__(
        self,
        logits: Array,
        uniforms: Iterable[float],  # noqa: ARG002 - the protocol's; nothing here is random
        token_ids: Array | None = None,
        *,
        highest: Sequence[int] | None = None,
    ) -> list[int]:
        """Return B token ids."""
        if token_ids is None and highest is not None:
            return list(highest)
        xp = array_namespace(logits)
        if token_ids is None:
            return [int(token_id) for token_id in xp.argmax(logits, axis=-1)]
        is_largest = logits == xp.max(logits, axis=-1, keepdims=True)
        others = xp.full_like(token_ids, xp.iinfo(token_ids.dtype).max)
        return [int(i) for i in xp.min(xp.where(is_largest, token_ids, others), axis=-1)]


@dataclass(frozen=True, slots=True)
class Sampled:
    """Draws from the softmax of what the filters leave, filters in their order."""

    filters: tuple[Filter, ...]

    @property
    def num_candidates(self) -> int | None:
        """One more than a top-k that comes first: it tells whether the last of the k has equals."""
        first = self.filters[0] if self.filters else None
        return first.count + 1 if isinstance(first, TopK) else None

    def is_decided_by(self, logits: Array) -> bool:
        """Tell whether none that is missing can equal the last of the k: those would be kept too."""
        xp = array_namespace(logits)
        if self.num_candidates is None or logits.shape[0] < self.num_candidates:
            return False
        ascending = xp.sort(logits, stable=False)
        return bool(ascending[0] < ascending[logits.shape[0] - self.num_candidates + 1])

    def __call__(
        self,
        logits: Array,
        uniforms: Iterable[float],
        token_ids: Array | None = None,
        *,
        highest: Sequence[int] | None = None,  # noqa: ARG002 - the protocol's
    ) -> list[int]:
        """Return B token ids."""
        return [
            draw(
                self.candidates(logits[row, :], None if token_ids is None else token_ids[row, :]),
                uniform,
            )
            for row, uniform in enumerate(uniforms)
        ]

    def candidates(self, logits: Array, token_ids: Array | None = None) -> Candidates:
        """Return what the filters leave of one row's logits [C] and their ids [C]."""
        candidates = Candidates.of(logits, token_ids)
        for narrow in self.filters:
            candidates = narrow(candidates)
        return candidates


def sampling_method(options: GenerationOptions) -> SamplingMethod:
    """Return the method that the options describe.

    The outcome is that of transformers' order: temperature, top-k, top-p. Top-k goes first here,
    which keeps the same tokens and leaves the temperature a handful of logits to divide.
    """
    if options.is_greedy:
        return Greedy()
    filters: list[Filter] = []
    if options.top_k:
        filters.append(TopK(options.top_k))
    if options.temperature not in (None, 1.0):
        filters.append(Temperature(options.temperature))
    if options.top_p is not None and options.top_p < 1:
        filters.append(TopP(options.top_p))
    return Sampled(tuple(filters))

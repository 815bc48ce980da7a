"""Ways to choose one token per row: `Greedy` and `Sampled`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from array_api_compat import array_namespace

from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sampling.candidates import Array, Candidates
from gemma_deploy.runtime.sampling.draw import draw
from gemma_deploy.runtime.sampling.filters import Filter, Temperature, TopK, TopP


class SamplingMethod(Protocol):
    """Chooses one token for each row of a batch."""

    def __call__(self, logits: Array, uniforms: Sequence[float]) -> list[int]:
        """Return B token ids.

        Args:
            logits: float32 [B, V], finite, of any array library.
            uniforms: One random number in [0, 1) per row; what is chosen depends on nothing else.
        """
        ...


@dataclass(frozen=True, slots=True)
class Greedy:
    """Takes the likeliest token, the lowest id among equals."""

    def __call__(self, logits: Array, uniforms: Sequence[float]) -> list[int]:  # noqa: ARG002 - the protocol's; nothing here is random
        """Return B token ids."""
        xp = array_namespace(logits)
        return [int(token_id) for token_id in xp.argmax(logits, axis=-1)]


@dataclass(frozen=True, slots=True)
class Sampled:
    """Draws from the softmax of what the filters leave, filters in their order."""

    filters: tuple[Filter, ...]

    def __call__(self, logits: Array, uniforms: Sequence[float]) -> list[int]:
        """Return B token ids."""
        return [
            draw(self.candidates(logits[row, :]), uniform) for row, uniform in enumerate(uniforms)
        ]

    def candidates(self, logits: Array) -> Candidates:
        """Return what the filters leave of one row's logits [V]."""
        candidates = Candidates(logits)
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
    if options.top_k is not None:
        filters.append(TopK(options.top_k))
    if options.temperature not in (None, 1.0):
        filters.append(Temperature(options.temperature))
    if options.top_p is not None and options.top_p < 1:
        filters.append(TopP(options.top_p))
    return Sampled(tuple(filters))

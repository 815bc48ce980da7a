"""Two sources of logits compared: how far a bundle is from the model it was made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.graph_spec import CacheDType, DType, Precision

FloatArray = npt.NDArray[np.floating[Any]]

# Shares of the largest logit; see `default_tolerance`.
_NARROWED: Mapping[CacheDType, float] = {
    "float32": 1e-4,
    "float16": 1e-2,
    "bfloat16": 5e-2,
    "int8": 5e-2,
}
_WIDENED: Mapping[DType, float] = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 5e-3}
# Rows of logits whose probabilities are computed at a time: 16 x 262144 x 8 bytes is 34 MB.
_BLOCK_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """A text, and where in it logits are compared.

    Attributes:
        token_ids: The text's tokens.
        positions: Ascending indexes into them; the logits after reading the token at a position
            are those of the next token.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]


LogitsSource = Callable[[Sequence[TokenRow]], Iterable[FloatArray]]
"""Gives for each row in turn the logits [len(positions), V] at its positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """How far a candidate's logits are from a reference's.

    The four differences are None if any of the candidate's logits is not finite: there is no
    number then that would say how far it is.

    Attributes:
        positions: Number of positions compared.
        non_finite_positions: Positions where any of the candidate's logits is NaN or infinite.
        max_abs_difference: Largest difference of any logit.
        mean_abs_difference: Mean over all logits.
        max_kl_nats: Largest Kullback-Leibler divergence of the candidate's next-token
            distribution from the reference's, in nats.
        mean_kl_nats: Mean over the positions.
        greedy_agreement: Share of positions with the same likeliest token.
        disagreements: Positions with another likeliest token although the reference's best two
            logits are further apart than the tolerance: a nearer tie may fall either way.
        tolerance: Largest difference of a logit that still passes.
    """

    positions: int
    non_finite_positions: int
    max_abs_difference: float | None
    mean_abs_difference: float | None
    max_kl_nats: float | None
    mean_kl_nats: float | None
    greedy_agreement: float
    disagreements: int
    tolerance: float

    @property
    def is_within(self) -> bool:
        """Whether the candidate passes."""
        return (
            self.max_abs_difference is not None
            and self.max_abs_difference <= self.tolerance
            and not self.disagreements
        )


class ParityCounter:
    """Adds up comparisons and reports on all of them.

    Args:
        tolerance: Largest difference of a logit that passes, above 0.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._positions = 0
        self._non_finite_positions = 0
        self._num_logits = 0
        self._max_difference = 0.0
        self._sum_difference = 0.0
        self._max_kl = 0.0
        self._sum_kl = 0.0
        self._num_same = 0
        self._disagreements = 0

    def add(self, reference: FloatArray, candidate: FloatArray) -> None:
        """Compare logits [P, V] of the same P positions.

        Raises:
            ValueError: The shapes differ.
        """
        if reference.shape != candidate.shape:
            raise ValueError(f"logits {candidate.shape} compared with logits {reference.shape}")
        for start in range(0, len(reference), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            self._add_block(reference[block].astype(np.float64), candidate[block])

    def report(self) -> ParityReport:
        """Return the figures of everything added so far.

        Raises:
            ValueError: Nothing was added: there is nothing to say.
        """
        if not self._positions:
            raise ValueError("no logits were compared")
        is_finite = not self._non_finite_positions
        return ParityReport(
            positions=self._positions,
            non_finite_positions=self._non_finite_positions,
            max_abs_difference=self._max_difference if is_finite else None,
            mean_abs_difference=self._sum_difference / self._num_logits if is_finite else None,
            max_kl_nats=self._max_kl if is_finite else None,
            mean_kl_nats=self._sum_kl / self._positions if is_finite else None,
            greedy_agreement=self._num_same / self._positions,
            disagreements=self._disagreements,
            tolerance=self._tolerance,
        )

    def _add_block(self, reference: FloatArray, candidate: FloatArray) -> None:
        self._positions += len(reference)
        self._num_logits += reference.size
        is_finite = np.isfinite(candidate).all(axis=-1)
        self._non_finite_positions += int((~is_finite).sum())
        if not is_finite.any():
            return
        reference, candidate = reference[is_finite], candidate[is_finite]
        difference = np.abs(candidate - reference)
        self._max_difference = max(self._max_difference, float(difference.max()))
        self._sum_difference += float(difference.sum())
        divergence = kl_divergence(reference, candidate)
        self._max_kl = max(self._max_kl, float(divergence.max()))
        self._sum_kl += float(divergence.sum())
        is_same = reference.argmax(axis=-1) == candidate.argmax(axis=-1)
        self._num_same += int(is_same.sum())
        best_two = np.partition(reference, -2, axis=-1)[:, -2:]
        is_clear = best_two[:, 1] - best_two[:, 0] > self._tolerance
        self._disagreements += int((~is_same & is_clear).sum())


def kl_divergence(reference: FloatArray, candidate: FloatArray) -> npt.NDArray[np.float64]:
    """Return KL(reference || candidate) of the softmax of logits [P, V], in nats, [P].

    Computed in float64, so that distributions nearly equal do not come out negative.
    """
    log_p = log_softmax(reference)
    kl: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_softmax(candidate))).sum(axis=-1)
    return kl.clip(min=0.0)  # rounding may still leave -1e-17


def log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Return the log-probabilities, in nats, of logits [P, V]; in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normalized: npt.NDArray[np.float64] = shifted - np.log(
        np.exp(shifted).sum(axis=-1, keepdims=True)
    )
    return normalized


def compare(
    rows: Sequence[TokenRow],
    reference: Sequence[FloatArray],
    candidate: LogitsSource,
    *,
    tolerance: float,
) -> ParityReport:
    """Run a candidate over rows of tokens and compare it with a reference.

    Args:
        rows: The texts.
        reference: For each row its logits [len(positions), V].
        candidate: What is judged.
        tolerance: Largest difference of a logit that passes.
    """
    counter = ParityCounter(tolerance)
    for expected, actual in zip(reference, candidate(rows), strict=True):
        counter.add(expected, actual)
    return counter.report()


def default_tolerance(
    precision: Precision,
    checkpoint: Checkpoint | None,
    reference: Sequence[FloatArray],
    *,
    is_widened: bool = False,
) -> float:
    """Return the largest difference of a logit that rounding alone explains.

    Rounding errors grow with the numbers that are rounded, so it is a share of the reference's
    largest logit:

    * 1e-4: the weights are as they were and the graph computes in float32. Only the order of
      float32 sums differs, some hundred roundings of 6e-8 deep.
    * 1e-2: the graph computes in float16, whose roundings are of 5e-4, or attends in it, as it does
      with a float16 cache, or the weights were narrowed to it.
    * 5e-2: the same with bfloat16: roundings of 4e-3.
    * 5e-2: the cache holds int8 codes, as the reference's does: where a key or value lies half-way
      between two, another order of summing takes the other, up to 8e-3 away.
    * 1e-3 (float16) or 5e-3 (bfloat16): a graph that is widened, on weights as they were: two of
      these roundings, of the embedding's factor.

    Args:
        precision: The candidate's.
        checkpoint: What it was made of; None where the reference has the candidate's own weights.
        reference: Logits of the checkpoint, or of these weights in float32.
        is_widened: Whether the graph is made to compute in 16 bits, and was computed in float32.
    """
    tensors = {} if checkpoint is None else checkpoint.tensors
    stored = {DTYPE_NAMES[tensor.dtype] for tensor in tensors.values()}
    are_weights_exact = precision.weights == "float32" or stored <= {precision.weights}
    if is_widened or precision.activations == precision.cache == "float32":
        exact, inexact = _WIDENED[precision.activations], _NARROWED[precision.weights]
        share = exact if are_weights_exact else inexact
    else:
        share = max(_NARROWED[precision.activations], _NARROWED[precision.cache])
    return share * max(float(np.abs(logits).max()) for logits in reference)

"""KL divergence of logits that come in blocks of the vocabulary: `KLSum`."""

import torch
from torch import Tensor


class KLSum:
    """KL divergence of rows of logits from a reference's; never is there a whole row in memory.

    Args:
        num_tokens: Rows.
    """

    def __init__(self, num_tokens: int) -> None:
        self._own = _ExpSum(num_tokens)
        self._other = _ExpSum(num_tokens)
        self._weighted = torch.zeros(num_tokens, dtype=torch.float64)

    def add(self, own: Tensor, other: Tensor) -> None:
        """Add logits [tokens, some of V] of the reference and of what is compared."""
        own, other = own.to(torch.float64, copy=True), other.to(torch.float64, copy=True)
        difference = own - other
        shares, shrunk = self._own.add(own)
        self._weighted = self._weighted * shrunk + torch.linalg.vecdot(shares, difference)
        self._other.add(other)

    def mean(self) -> float:
        """Return the mean over tokens, in nats; NaN where a logit was no number."""
        differences = self._weighted / self._own.total
        kl = differences + self._other.log() - self._own.log()
        # Rounding may leave -1e-17 where the distributions are equal.
        return float(kl.mean().clamp(min=0.0))


class _ExpSum:
    """Sums of exp of rows of float64 logits, kept as multiples of exp of the largest so far."""

    def __init__(self, num_tokens: int) -> None:
        self.total = torch.zeros(num_tokens, dtype=torch.float64)
        self._peak = torch.full((num_tokens,), -torch.inf, dtype=torch.float64)

    def add(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Add logits, in place.

        Returns:
            exp of each, and what earlier sums were multiplied with, both by the largest so far.
        """
        peak = torch.maximum(self._peak, logits.amax(-1))
        shrunk = (self._peak - peak).exp()
        powers = logits.sub_(peak[:, None]).exp_()
        self.total = self.total * shrunk + powers.sum(-1)
        self._peak = peak
        return powers, shrunk

    def log(self) -> Tensor:
        """Return the logarithms of the sums."""
        return self._peak + self.total.log()


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return logits under Gemma 2's soft cap; as they are without one."""
    return logits if cap is None else cap * torch.tanh(logits / cap)

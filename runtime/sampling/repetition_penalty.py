"""The repetition penalty, on the logits of a whole batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace, device

from gemma_deploy.runtime.sampling.candidates import Array


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """Makes tokens that are already in a row's sequence less likely, or likelier below 1.

    A positive logit is divided by `value`, a negative one multiplied (CTRL,
    https://arxiv.org/abs/1909.05858), once however often the token occurs.
    """

    value: float

    def __call__(self, logits: Array, histories: Sequence[npt.NDArray[np.int64]]) -> Array:
        """Return the penalized logits [B, V] float32 in new memory.

        Args:
            logits: float32 [B, V].
            histories: Per row, the token ids [n] of its prompt and of what was generated.
        """
        if isinstance(logits, np.ndarray):
            penalized = logits.copy()
            for row, history in zip(penalized, histories, strict=True):
                row[history] = self._penalized(row[history])
            return penalized
        xp = array_namespace(logits)
        # On the host: the standard has no assignment at many indexes.
        is_seen = np.zeros(logits.shape, np.bool_)
        for row, history in enumerate(histories):
            is_seen[row, history] = True
        seen = xp.asarray(is_seen, device=device(logits))
        return xp.where(seen, self._penalized(logits), logits)

    def _penalized(self, logits: Array) -> Array:
        xp = array_namespace(logits)
        # Above 1 the lesser is the quotient of a positive logit and the product of a negative one.
        choose = xp.minimum if self.value > 1 else xp.maximum
        return choose(logits * self.value, logits / self.value)

"""The highest logit of each row, found by the passes that prove all of them finite."""

import math

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from gemma_deploy.runtime.sampling.candidates import Array


def highest_if_finite(logits: Array) -> list[int | None]:
    """Return the index of each row's highest logit, the lowest index among equals.

    Args:
        logits: float32 [B, C], of any array library.

    Returns:
        B indexes; None for a row that has NaN or infinity anywhere.
    """
    if isinstance(logits, np.ndarray):
        return [_highest_on_host(row) for row in logits]
    xp = array_namespace(logits)
    # NaN passes through both extremes: no temporary array of V.
    extremes = xp.stack([xp.min(logits, axis=-1), xp.max(logits, axis=-1)])
    is_finite = xp.all(xp.isfinite(extremes), axis=0)
    highest = xp.argmax(logits, axis=-1)
    # A device is waited for once per row.
    found = [int(index) for index in xp.where(is_finite, highest, xp.full_like(highest, -1))]
    return [None if index < 0 else index for index in found]


def _highest_on_host(row: npt.NDArray[np.float32]) -> int | None:
    """Return what `highest_if_finite` does, of one row.

    After a step of the model the caches are cold, logits and code: two passes that run the same code
    take half the time of three and a look at their results with whole-array functions.
    """
    # For both NaN is the extreme, and an infinity is one of the two.
    highest = row.argmax()
    is_finite = math.isfinite(row[highest]) and math.isfinite(row[row.argmin()])
    return int(highest) if is_finite else None

"""Rounding without a thread pool: `round_half_even_`."""

from typing import Final

from torch import Tensor

# Added to a float32 of at most 2^22, it leaves no bit for what is behind the point.
_NO_FRACTION: Final = 1.5 * 2.0**23


def round_half_even_(values: Tensor) -> Tensor:
    """Round to the nearest whole numbers in place, ties to the even one; return `values`.

    Two sums do it. torch.round wakes MKL's threads for every call, which for a column or a few thousand
    elements takes a thousand times as long as the rounding.

    Args:
        values: float32, of magnitude 2^22 at most; larger ones come out whole, but not the nearest.
    """
    return values.add_(_NO_FRACTION).sub_(_NO_FRACTION)

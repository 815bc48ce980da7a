"""Weights that lie on a 4-bit grid already: `grid_scales`.

Quantization-aware training and unpacked 4-bit files leave weights that are whole multiples of a step,
-8 to 7 of them. A scale taken from a block's extremes misses that step where no weight of the block is
as large as the grid allows; the step itself gives back every weight.
"""

from typing import Final

import torch
from torch import Tensor

from gemma_deploy.quantization.rounding import round_half_even_

_LARGEST: Final = 8
_PROBES: Final = 4
# A weight and the extreme that the step is taken from are each rounded to bfloat16, by 2^-8 at most.
_TOLERANCE: Final = 2.0**-7 * 1.05


def grid_scales(blocks: Tensor) -> Tensor:
    """Return the step of the grid that the weights of each block lie on.

    Args:
        blocks: float32 [..., size], finite.

    Returns:
        float32 [...]: what a code of 1 stands for, negative where a weight is +8 steps of its size; 1
        for blocks of zeros, 0 for blocks on no grid. On a grid every weight is within bfloat16's
        rounding of a whole number of steps, from -8 to 7.
    """
    rows = blocks.reshape(-1, blocks.shape[-1])
    extremes = signed_extremes(rows)
    found = torch.where(extremes == 0, 1.0, 0.0)
    # Few weights of a block rule out nearly every step.
    probes = rows[:, :: max(1, rows.shape[-1] // _PROBES)].T.contiguous()
    for code in range(1, _LARGEST + 1):
        steps = extremes / code
        is_open = _is_whole(probes / steps) & (found == 0)
        some = is_open.nonzero().flatten()
        if len(some):
            found[some] = _fitted(rows[some], steps[some])
    return found.view(blocks.shape[:-1])


def is_on_grid(weight: Tensor, block_size: int) -> Tensor:
    """Tell which rows of a matrix [N, K] are nothing but blocks on a grid and zeros; bool [N]."""
    return (grid_scales(weight.reshape(len(weight), -1, block_size)) != 0).all(-1)


def signed_extremes(blocks: Tensor) -> Tensor:
    """Return the weight of largest magnitude in each block [..., size], sign and all; [...]."""
    high, low = blocks.amax(-1), blocks.amin(-1)
    return torch.where(high > -low, high, low)


def _fitted(rows: Tensor, steps: Tensor) -> Tensor:
    """Return the steps [n] of rows [n, size] fitted to all their weights; 0 where they do not fit."""
    multiples = (rows / steps.unsqueeze(-1)).T
    codes = round_half_even_(multiples.clone())
    is_on_grid = _is_whole(multiples)
    # The extreme is positive in units of its own step: the sixteenth code is -8.
    is_full = codes.amax(0) == _LARGEST
    is_on_grid &= codes.amin(0) >= torch.where(is_full, 1.0 - _LARGEST, -float(_LARGEST))
    least_squares = (rows.T * codes).sum(0) / codes.square().sum(0)
    return torch.where(is_on_grid, torch.where(is_full, -least_squares, least_squares), 0.0)


def _is_whole(multiples: Tensor) -> Tensor:
    """Tell which columns [size, n] are whole numbers, up to bfloat16's rounding; bool [n]."""
    codes = round_half_even_(multiples.clone())
    return ((multiples - codes).abs() <= _TOLERANCE * codes.abs()).all(0)

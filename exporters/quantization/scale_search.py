"""Scales of blocks by what rounding with them costs: `search_scales`."""

from typing import Final

import torch
from torch import Tensor

from gemma_deploy.quantization.codes import round_codes
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.quantization.grid import grid_scales, signed_extremes

# What the element of largest magnitude becomes, of either sign. -8 makes use of the sixteenth code;
# beyond -8 and 7 that element is clipped, for smaller steps everywhere else.
_LARGEST_CODES: Final = (8.0, 7.5, 7.0, 8.5, 9.0, 9.5, 6.5, 6.0)
_EXTREME_CODES: Final = {
    "int4": tuple(sign * code for code in _LARGEST_CODES for sign in (-1.0, 1.0)),
    "int8": (127.0,),
}
# Rounding and fitting in turn ends within a few rounds; the last ones hardly gain anything.
_MOST_FITS: Final = 4
# torch runs operations on this many elements without waking its threads, and they stay in the cache.
_ELEMENTS_AT_ONCE: Final = 32768


def search_scales(weight: Tensor, importance: Tensor, weight_format: WeightFormat) -> Tensor:
    """Return the scale of each block that rounds it with the least weighted squared error.

    Several codes are tried for a block's extreme; from the best, scales are fitted to codes by weighted
    least squares and codes rounded again, in turn, as long as that helps. Compare `make_qx_quants` in
    llama.cpp's ggml-quants.c. Weights that lie on a grid of int4 keep its scale.

    Args:
        weight: float32 [N, K], finite.
        importance: [K], what a squared error of an element counts.
        weight_format: int4 or int8. Scales of int4 have either sign; those of int8 are positive, as
            TensorRT wants them.

    Returns:
        float32 [N, K / block_size], exactly representable in float16; never zero.
    """
    rows = max(1, _ELEMENTS_AT_ONCE // weight.shape[-1])
    return torch.cat(
        [_searched(part, importance, weight_format) for part in torch.split(weight, rows)]
    )


def storable(scales: Tensor) -> Tensor:
    """Return float32 scales rounded to float16; 1 where they vanish, as blocks of zeros have."""
    rounded = scales.to(torch.float16).float()
    return torch.where(rounded == 0, 1.0, rounded)


def _searched(weight: Tensor, importance: Tensor, weight_format: WeightFormat) -> Tensor:
    size = weight_format.block_size or weight.shape[-1]
    blocks = weight.reshape(weight.shape[0], -1, size)  # [N, K / block, block]
    fit = _Fit(blocks, importance.view(blocks.shape[1:]), weight_format)
    extremes = signed_extremes(blocks)
    if weight_format.scheme == "int8":
        extremes = extremes.abs()
    fit.scales = extremes / _EXTREME_CODES[weight_format.scheme][0]
    for code in _EXTREME_CODES[weight_format.scheme]:
        fit.round_with(extremes / code)
    for _ in range(_MOST_FITS):
        if not fit.round_with(fit.scales):
            break
    scales = fit.scales
    if weight_format.scheme == "int4":
        on_grid = grid_scales(blocks)
        scales = torch.where(on_grid == 0, scales, on_grid)
    return storable(scales)


class _Fit:
    """The best codes found so far for some blocks, as their least-squares scales.

    Attributes:
        scales: float32 [N, K / block]; what they are set to at first where no codes are better.

    Args:
        blocks: float32 [N, K / block, block].
        counts: float32 [K / block, block], what squared errors count.
        weight_format: Of the codes.
    """

    def __init__(self, blocks: Tensor, counts: Tensor, weight_format: WeightFormat) -> None:
        self._blocks = blocks
        self._counts = counts
        self._weighted = blocks * counts
        self._format = weight_format
        self._codes = torch.empty_like(blocks)
        self._products = torch.empty_like(blocks)
        self._gains = torch.zeros(blocks.shape[:-1])
        self.scales = torch.zeros(blocks.shape[:-1])

    def round_with(self, scales: Tensor) -> bool:
        """Round with these scales [N, K / block], and fit scales to the codes; tell if any is better."""
        inverse = torch.where(scales == 0, 0.0, 1 / scales).unsqueeze(-1)
        codes = round_codes(torch.mul(self._blocks, inverse, out=self._codes), self._format)
        # The error is sum c (w - s q)^2 = sum c w^2 - gain at the best s.
        slope = torch.mul(codes, self._weighted, out=self._products).sum(-1)
        squares = torch.mul(codes, codes, out=self._products).mul_(self._counts).sum(-1)
        fitted = torch.where(squares > 0, slope / squares, 0.0)
        gains = fitted * slope
        is_better = gains > self._gains
        self._gains = torch.where(is_better, gains, self._gains)
        self.scales = torch.where(is_better, fitted, self.scales)
        return bool(is_better.any())

"""Scales of blocks by what rounding with them costs: `search_scales`."""

from typing import Final

import torch
from torch import Tensor

from gemma_deploy.quantization.codes import round_codes
from gemma_deploy.quantization.formats import WeightFormat

# What the element of largest magnitude becomes, sign and all. -8 makes use of the sixteenth code;
# beyond -8 and 7 that element is clipped, for smaller steps everywhere else.
_EXTREME_CODES: Final = {
    "int4": (-8.0, -7.0, -7.5, -8.5, -9.0, -9.5, -10.0, -6.5, 7.0, 7.5, 8.0, 8.5),
    "int8": (127.0,),
}


def search_scales(weight: Tensor, importance: Tensor, weight_format: WeightFormat) -> Tensor:
    """Return the scale of each block that rounds it with the least weighted squared error.

    Args:
        weight: float32 [N, K], finite.
        importance: [K], what a squared error of an element counts.
        weight_format: int4 or int8. Scales of int4 take the sign that puts a block's extreme on -8,
            as llama.cpp's Q4_0 does, or on 7; those of int8 are positive, as TensorRT wants them.

    Returns:
        float32 [N, K / block_size], exactly representable in float16; never zero.
    """
    size = weight_format.block_size or weight.shape[-1]
    blocks = weight.reshape(weight.shape[0], -1, size)  # [N, K / block, block]
    counts = importance.view(blocks.shape[1:])
    extremes = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    if weight_format.scheme == "int8":
        extremes = extremes.abs()
    best_scales = best_errors = torch.empty(0)
    for code in _EXTREME_CODES[weight_format.scheme]:
        scales = storable(extremes / code)
        rounded = round_codes(blocks / scales, weight_format).mul_(scales)
        errors = rounded.sub_(blocks).square_().mul_(counts).sum(-1, keepdim=True)
        if not best_scales.numel():
            best_scales, best_errors = scales, errors
            continue
        is_better = errors < best_errors
        best_scales = torch.where(is_better, scales, best_scales)
        best_errors = torch.where(is_better, errors, best_errors)
    return best_scales.squeeze(-1)


def storable(scales: Tensor) -> Tensor:
    """Return float32 scales rounded to float16; 1 where they vanish, as blocks of zeros have."""
    rounded = scales.to(torch.float16).float()
    return torch.where(rounded == 0, 1.0, rounded)


"""Weights to codes and back: `quantize`, `dequantize`, and how codes are packed into bytes.

Everything works on rows by themselves, so a matrix may be given in blocks of rows.

Sources: NF4 is bitsandbytes' (QLoRA, https://arxiv.org/abs/2305.14314, appendix E); E4M3 is
https://arxiv.org/abs/2209.05433.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.quantization.grid import grid_scales
from gemma_deploy.quantization.rounding import round_half_even_

NF4_TABLE: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The sixteen values of NF4, as shares of a block's largest magnitude."""

LARGEST_CODE: Final = {"int4": 7.0, "int8": 127.0, "nf4": 1.0, "fp8": 448.0}
"""The largest code of each scheme."""
SMALLEST_CODE: Final = {"int4": -8.0, "int8": -127.0}
"""The smallest code of the schemes whose codes are whole numbers."""


class Quantized(NamedTuple):
    """Codes and scales of some rows of a matrix.

    Attributes:
        codes: [n, K]; int8 (of nf4: indexes into `NF4_TABLE`), or float8_e4m3fn.
        scales: float16 [n, K / block_size], or [n, 1].
    """

    codes: Tensor
    scales: Tensor


def quantize(
    weight: Tensor, weight_format: WeightFormat, scales: Tensor | None = None
) -> Quantized:
    """Round to nearest, each block by its own scale.

    Args:
        weight: float32 [n, K], finite.
        weight_format: A quantized format whose blocks divide K.
        scales: float16, what a code of 1 stands for; None for the finest steps that reach each
            block's extremes: of int4 they take the sign that puts the larger one on -8, as
            llama.cpp's Q4_0 does, or are those of the grid that the weights lie on. None may be zero.

    Returns:
        Codes that are within half a step of `weight` where it is in the scales' range.
    """
    blocks = _blocked(weight, weight_format)  # [n, K / block, block]
    if scales is None:
        scales = _finest_scales(blocks, weight_format).to(torch.float16)
        # TensorRT refuses a scale of zero; blocks of zeros, as unused tokens have, need none.
        scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    # By the rounded scales, which the codes will be multiplied with.
    steps = blocks / scales.float().unsqueeze(-1)
    return Quantized(_rounded(steps, weight_format).reshape(weight.shape), scales)


def dequantize(quantized: Quantized, weight_format: WeightFormat) -> Tensor:
    """Return what codes and scales stand for, float32 [n, K]."""
    codes, scales = quantized
    if weight_format.scheme == "nf4":
        table = torch.tensor(NF4_TABLE, dtype=torch.float32)
        values = table[codes.long()]
    else:
        values = codes.float()
    return (_blocked(values, weight_format) * scales.float().unsqueeze(-1)).reshape(codes.shape)


def round_codes(steps: Tensor, weight_format: WeightFormat) -> Tensor:
    """Round weights in units of their scale to the nearest codes of int4 or int8, in place.

    Args:
        steps: float32; changed, and returned.
        weight_format: int4 or int8.
    """
    scheme = weight_format.scheme
    return round_half_even_(steps.clamp_(SMALLEST_CODE[scheme], LARGEST_CODE[scheme]))


def pack(codes: Tensor, weight_format: WeightFormat) -> Tensor:
    """Return codes [n, K] as the weights file holds them; see `formats`."""
    if weight_format.scheme == "int4":
        low, high = (codes[:, i::2].to(torch.uint8) & 0xF for i in (0, 1))
    elif weight_format.scheme == "nf4":
        high, low = (codes[:, i::2].to(torch.uint8) for i in (0, 1))
    else:
        return codes
    return low | high << 4


def unpack(stored: Tensor, weight_format: WeightFormat) -> Tensor:
    """Return codes [n, K] of what `pack` returned."""
    if weight_format.bits != 4:
        return stored
    low, high = stored & 0xF, stored >> 4
    if weight_format.scheme == "nf4":
        return torch.stack((high, low), dim=-1).flatten(1).to(torch.int8)
    codes = torch.stack((low, high), dim=-1).flatten(1).to(torch.int8)
    return codes.bitwise_xor_(8).sub_(8)  # two's complement of four bits, in eight


def _blocked(rows: Tensor, weight_format: WeightFormat) -> Tensor:
    """[n, K] -> [n, K / block, block]."""
    return rows.reshape(len(rows), -1, weight_format.block_size or rows.shape[-1])


def _finest_scales(blocks: Tensor, weight_format: WeightFormat) -> Tensor:
    """Return the steps [n, K / block] by which no element is further than half a step from a code."""
    if weight_format.scheme != "int4":
        return blocks.abs().amax(-1) / LARGEST_CODE[weight_format.scheme]
    high, low = blocks.amax(-1), blocks.amin(-1)
    extreme = torch.where(high > -low, high, low)
    # The other end goes to 7 at most: where it is nearly as far out, both are half a step off.
    is_even = torch.minimum(high, -low) * 8 > extreme.abs() * 7.5
    on_grid = grid_scales(blocks)
    return torch.where(on_grid != 0, on_grid, extreme / torch.where(is_even, -7.5, -8.0))


def _rounded(steps: Tensor, weight_format: WeightFormat) -> Tensor:
    """Return the codes nearest to weights in units of their scale."""
    match weight_format.scheme:
        case "int4" | "int8":
            return round_codes(steps, weight_format).to(torch.int8)
        case "nf4":
            table = torch.tensor(NF4_TABLE, dtype=torch.float32)
            return torch.bucketize(steps, (table[1:] + table[:-1]) / 2).to(torch.int8)
        case _:
            largest = LARGEST_CODE["fp8"]
            return steps.clamp(-largest, largest).to(torch.float8_e4m3fn)

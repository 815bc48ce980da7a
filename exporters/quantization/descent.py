"""Codes and scales improved in turn, each to its best while all others stay: `descend`."""

import torch
from torch import Tensor

from gemma_deploy.exporters.quantization.scale_search import storable
from gemma_deploy.quantization.codes import round_codes
from gemma_deploy.quantization.formats import WeightFormat

# More of them take time and gain little: the fourth and fifth a hundredth of the error.
_SWEEPS = 3


def descend(
    target: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, weight_format: WeightFormat
) -> None:
    """Lower tr((T - Q) H (T - Q)^T) by coordinate descent, in place.

    A sweep fits each block's scale by least squares, then each code, given everything else.

    Args:
        target: float32 [N, K].
        hessian: float32 [K, K], positive definite.
        codes: float32 [N, K], whole numbers; changed.
        scales: float32 [N, K / block_size]; changed.
        weight_format: int4 or int8.
    """
    size = weight_format.block_size or target.shape[-1]
    # Columns are taken one by one: as rows they lie together in memory.
    codes_t, scales_t = codes.T.contiguous(), scales.T.contiguous()
    error = target.T - codes_t * scales_t.repeat_interleave(size, 0)  # [K, N]
    for _ in range(_SWEEPS):
        for index in range(len(scales_t)):
            block = slice(index * size, (index + 1) * size)
            own = hessian[block, block]
            pull = hessian[block] @ error  # [block, N]: half the loss's slope, without its sign
            moved = _scale_step(pull, own, codes_t[block], scales_t[index], weight_format)
            scales_t[index] += moved
            shift = codes_t[block] * moved
            error[block] -= shift
            pull -= own @ shift
            error[block] -= _fit_codes(pull, own, codes_t[block], scales_t[index], weight_format)
    codes.copy_(codes_t.T)
    scales.copy_(scales_t.T)


def _scale_step(
    pull: Tensor, own: Tensor, codes: Tensor, scale: Tensor, weight_format: WeightFormat
) -> Tensor:
    """Return by how much a block's scale [N] goes to its best."""
    slope = (pull * codes).sum(0)
    curvature = ((own @ codes) * codes).sum(0)
    fitted = storable(scale + torch.where(curvature > 0, slope / curvature, 0.0))
    step = fitted - scale
    # Rounding to float16 may undo the gain, and only int4 has negative scales.
    is_better = step * (2 * slope - step * curvature) > 0
    if weight_format.scheme != "int4":
        is_better &= fitted > 0
    return torch.where(is_better, step, 0.0)


def _fit_codes(
    pull: Tensor, own: Tensor, codes: Tensor, scale: Tensor, weight_format: WeightFormat
) -> Tensor:
    """Fit a block's codes [block, N] in place, one after the other; return the weights' change."""
    changes = torch.empty_like(codes)
    inverse = 1 / scale
    curvatures = own.diagonal().tolist()
    for column, curvature in enumerate(curvatures):
        best = torch.addcmul(codes[column], pull[column], inverse, value=1 / curvature)
        rounded = round_codes(best, weight_format)
        torch.mul(rounded - codes[column], scale, out=changes[column])
        codes[column] = rounded
        pull[column + 1 :].addr_(own[column + 1 :, column], changes[column], alpha=-1)
    return changes

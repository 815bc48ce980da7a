"""Codes and scales improved in turn, each to its best while all others stay: `descend`."""

import torch
from torch import Tensor

from gemma_deploy.exporters.quantization.scale_search import storable
from gemma_deploy.quantization.codes import round_codes
from gemma_deploy.quantization.formats import WeightFormat

_SWEEPS = 5


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
    blocks = [slice(start, start + size) for start in range(0, target.shape[-1], size)]
    error = target - codes * scales.repeat_interleave(size, -1)
    for _ in range(_SWEEPS):
        for index, block in enumerate(blocks):
            own = hessian[block, block]
            pull = error @ hessian[:, block]  # [N, block]: half the loss's slope, without its sign
            moved = _scale_step(pull, own, codes[:, block], scales[:, index], weight_format)
            scales[:, index] += moved
            shift = codes[:, block] * moved.unsqueeze(-1)
            error[:, block] -= shift
            pull -= shift @ own
            error[:, block] -= _fit_codes(
                pull, own, codes[:, block], scales[:, index], weight_format
            )


def _scale_step(
    pull: Tensor, own: Tensor, codes: Tensor, scale: Tensor, weight_format: WeightFormat
) -> Tensor:
    """Return by how much a block's scale [N] goes to its best."""
    slope = (pull * codes).sum(-1)
    curvature = ((codes @ own) * codes).sum(-1)
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
    """Fit a block's codes in place, one column after the other; return the weights' change."""
    changes = torch.empty_like(codes)
    for column in range(codes.shape[-1]):
        best = codes[:, column] + pull[:, column] / (own[column, column] * scale)
        rounded = round_codes(best, weight_format)
        changes[:, column] = (rounded - codes[:, column]) * scale
        codes[:, column] = rounded
        pull -= torch.outer(changes[:, column], own[column])
    return changes

"""Codes and scales improved in turn, each to its best while all others stay: `descend`."""

import torch
from torch import Tensor

from gemma_deploy.exporters.quantization.scale_search import round_codes, storable
from gemma_deploy.quantization.formats import WeightFormat

_SWEEPS = 6


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
            pull = error @ hessian[:, block]  # [N, block]
            own = hessian[block, block]
            _fit_scale(error, pull, own, codes, scales, (index, block), weight_format)
            # The scale moved the block's own error.
            pull = error @ hessian[:, block]
            _fit_codes(error[:, block], pull, own, codes[:, block], scales[:, index], weight_format)


def _fit_scale(  # one step of `descend`, which holds all of it
    error: Tensor,
    pull: Tensor,
    own: Tensor,
    codes: Tensor,
    scales: Tensor,
    place: tuple[int, slice],
    weight_format: WeightFormat,
) -> None:
    index, block = place
    block_codes = codes[:, block]
    curvature = ((block_codes @ own) * block_codes).sum(-1)
    step = torch.where(curvature > 0, (pull * block_codes).sum(-1) / curvature, 0.0)
    fitted = storable(scales[:, index] + step)
    # Rounding to float16 may undo the gain, and only int4 has negative scales.
    change = fitted - scales[:, index]
    is_better = change * (2 * (pull * block_codes).sum(-1) - change * curvature) > 0
    if weight_format.scheme != "int4":
        is_better &= fitted > 0
    change = torch.where(is_better, change, 0.0)
    scales[:, index] += change
    error[:, block] -= block_codes * change.unsqueeze(-1)


def _fit_codes(  # one step of `descend`, which holds all of it
    error: Tensor,
    pull: Tensor,
    own: Tensor,
    codes: Tensor,
    scale: Tensor,
    weight_format: WeightFormat,
) -> None:
    """Fit a block's codes, one column after the other; `error`, `pull` and `codes` are views."""
    for column in range(codes.shape[-1]):
        best = codes[:, column] + pull[:, column] / (own[column, column] * scale)
        rounded = round_codes(best, weight_format)
        change = (rounded - codes[:, column]) * scale
        codes[:, column] = rounded
        error[:, column] -= change
        pull -= change.unsqueeze(-1) * own[column]

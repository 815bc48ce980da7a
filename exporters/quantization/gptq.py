"""Rounding that makes up for itself: `Gptq`.

GPTQ (https://arxiv.org/abs/2210.17323) rounds one input column after the other, the most used first,
and moves each column's error onto those still to come. Here scales are chosen beforehand, so that
blocks lie as they are stored whatever the order, and coordinate descent goes over the result.
"""

import torch
from torch import Tensor

from gemma_deploy.exporters.quantization.descent import descend
from gemma_deploy.exporters.quantization.scale_search import search_scales
from gemma_deploy.quantization.codes import Quantized, dequantize, quantize, round_codes
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.quantization.grid import is_on_grid

# Of the mean of the Hessian's diagonal; the paper's.
_DAMPING = 0.01
# Columns whose errors are moved one at a time; to those beyond they are moved together.
_COLUMNS_AT_ONCE = 128


class Gptq:
    """The inputs of some matrices, ready to quantize any of them.

    Memory: some five float32 matrices [K, K] while it is made, three afterwards.

    Args:
        hessian: float32 [K, K], mean of x x^T over the inputs; damped in place.
    """

    def __init__(self, hessian: Tensor) -> None:
        self.hessian = hessian
        damping = _DAMPING * float(hessian.diagonal().mean()) or 1.0
        self._factor, failed = torch.linalg.cholesky_ex(_damp(hessian, damping))
        while failed:
            damping *= 10
            self._factor, failed = torch.linalg.cholesky_ex(_damp(hessian, damping))
        self._order = hessian.diagonal().argsort(descending=True)
        ordered = hessian[self._order][:, self._order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
        self._inverse_factor = torch.linalg.cholesky(inverse, upper=True)

    def target(self, weight: Tensor, mismatch: Tensor) -> Tensor:
        """Return the weights that give the outputs wanted, by least squares.

        Args:
            weight: float32 [N, K].
            mismatch: float32 [N, K], mean of d x^T, where d is what the weights' output lacks.
        """
        return weight + torch.cholesky_solve(mismatch.T, self._factor).T

    def quantize(
        self, target: Tensor, weight_format: WeightFormat, weight: Tensor | None = None
    ) -> Quantized:
        """Return codes and scales whose outputs are close to the target's.

        An output is rounded to nearest where nothing better was found for these inputs, and where its
        weights lie on a grid of int4.

        Args:
            target: float32 [N, K]; the weights, or what `target` made of them.
            weight_format: int4 or int8.
            weight: The weights [N, K] that rounding to nearest would round; None for `target`.
        """
        size = weight_format.block_size or target.shape[-1]
        scales = search_scales(target, self.hessian.diagonal(), weight_format)
        codes = self._compensated(target, scales.repeat_interleave(size, -1), weight_format)
        descend(target, self.hessian, codes, scales, weight_format)
        found = Quantized(codes.to(torch.int8), scales.to(torch.float16))
        nearest = quantize(target if weight is None else weight, weight_format)
        losses = [self.losses(target - dequantize(x, weight_format)) for x in (found, nearest)]
        is_better = (losses[0] <= losses[1]).unsqueeze(-1)
        if weight_format.scheme == "int4":
            is_better &= ~is_on_grid(target if weight is None else weight, size).unsqueeze(-1)
        return Quantized(
            *(torch.where(is_better, *pair) for pair in zip(found, nearest, strict=True))
        )

    def losses(self, error: Tensor) -> Tensor:
        """Return the mean squared error of each output [N] that errors of weights [N, K] make."""
        return ((error @ self.hessian) * error).sum(-1)

    def _compensated(self, target: Tensor, steps: Tensor, weight_format: WeightFormat) -> Tensor:
        """Return codes, float32 [N, K], by the recursion of the paper's algorithm 1."""
        # Columns are taken one by one: as rows they lie together in memory.
        left, steps = target.T[self._order], steps.T[self._order]  # [K, N]
        factor = self._inverse_factor
        codes = torch.empty_like(left)
        for start in range(0, len(left), _COLUMNS_AT_ONCE):
            stop = min(start + _COLUMNS_AT_ONCE, len(left))
            errors = torch.empty_like(left[start:stop])
            for column in range(start, stop):
                codes[column] = round_codes(left[column] / steps[column], weight_format)
                error = torch.addcmul(left[column], codes[column], steps[column], value=-1)
                errors[column - start] = error.div_(factor[column, column])
                left[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
            left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        unordered = torch.empty_like(target)
        unordered.T[self._order] = codes
        return unordered


def _damp(hessian: Tensor, damping: float) -> Tensor:
    hessian.diagonal().add_(damping)
    return hessian

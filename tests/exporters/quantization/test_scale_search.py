import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_deploy.exporters.quantization.scale_search import search_scales
from gemma_deploy.quantization.codes import dequantize, quantize
from gemma_deploy.quantization.formats import WeightFormat

INT4 = WeightFormat("int4", 32)


def weights(seed: int, rows: int = 8, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def block_errors(weight: Tensor, scales: Tensor | None, importance: Tensor) -> Tensor:
    """Return the weighted squared error of each block of 32, [N, K / 32]."""
    rounded = dequantize(quantize(weight, INT4, scales), INT4)
    return ((rounded - weight).square() * importance).unflatten(-1, (-1, 32)).sum(-1)  # type: ignore[no-untyped-call, no-any-return]  # torch leaves it untyped


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_every_block_is_at_least_as_close_as_with_the_extreme_on_minus_8_or_7(seed: int) -> None:
    weight = weights(seed)
    importance = weights(seed + 1, 1)[0].square() + 0.01
    found = block_errors(weight, search_scales(weight, importance, INT4).half(), importance)
    largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    assert bool((found <= block_errors(weight, (largest / 7).half(), importance) + 1e-6).all())
    extreme = weight.unflatten(-1, (-1, 32)).aminmax(dim=-1)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    signed = torch.where(-extreme.min > extreme.max, extreme.min, extreme.max)
    assert bool((found <= block_errors(weight, (signed / -8).half(), importance) + 1e-6).all())


def test_what_counts_more_comes_closer() -> None:
    weight = weights(0, rows=64)
    importance = torch.ones(64)
    importance[::2] = 100.0
    errors = [
        (dequantize(quantize(weight, INT4, scales.half()), INT4) - weight)[:, ::2].square().sum()
        for scales in (
            search_scales(weight, importance, INT4),
            search_scales(weight, torch.ones(64), INT4),
        )
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("weight_format", [INT4, WeightFormat("int8", 32)])
def test_blocks_that_count_for_nothing_are_kept(weight_format: WeightFormat) -> None:
    weight, importance = weights(0), torch.ones(64)
    importance[:32] = 0.0
    scales = search_scales(weight, importance, weight_format)
    found = dequantize(quantize(weight, weight_format, scales.half()), weight_format)
    assert float((found - weight)[:, :32].norm() / weight[:, :32].norm()) < 0.15


@pytest.mark.parametrize("weight_format", [INT4, WeightFormat("int8", 32), WeightFormat("int8")])
def test_blocks_of_zeros_have_a_scale_that_is_not_zero(weight_format: WeightFormat) -> None:
    scales = search_scales(torch.zeros(2, 64), torch.ones(64), weight_format)
    assert bool((scales == 1).all())


def test_scales_of_int8_are_positive_as_tensorrt_wants_them() -> None:
    scales = search_scales(weights(0), torch.ones(64), WeightFormat("int8", 32))
    assert bool((scales > 0).all())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_no_block_is_worse_than_rounded_to_nearest(seed: int) -> None:
    weight = weights(seed) * 0.02
    importance = weights(seed + 1, 1)[0].square() + 0.01
    found = block_errors(weight, search_scales(weight, importance, INT4).half(), importance)
    assert bool((found <= block_errors(weight, None, importance) * (1 + 1e-5)).all())


def test_no_fine_grid_of_scales_holds_a_much_better_one() -> None:
    """numpy tries 4,000 scales of either sign for every block, in float64."""
    weight, importance = weights(0, rows=64, columns=32), weights(1, 1, 32)[0].square() + 0.01
    found = block_errors(weight, search_scales(weight, importance, INT4).half(), importance)
    rows, counts = weight.double().numpy(), importance.double().numpy()
    best = np.empty(len(rows))
    for index, row in enumerate(rows):
        steps = np.linspace(0.3, 1.6, 2000) * np.abs(row).max() / 8
        scales = np.concatenate((steps, -steps))[:, None]
        codes = np.clip(np.round(row / scales), -8, 7)
        best[index] = ((codes * scales - row) ** 2 * counts).sum(-1).min()
    ours = found[:, 0].double().numpy()
    assert ours.sum() <= 1.03 * best.sum()
    assert np.quantile(ours / best, 0.9) <= 1.05


def test_weights_on_a_grid_keep_its_scale() -> None:
    codes = torch.randint(-3, 4, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    scales = search_scales(codes * 0.125, torch.rand(64) + 0.1, INT4)
    torch.testing.assert_close(scales.abs(), torch.full((8, 2), 0.125))

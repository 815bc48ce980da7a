"""Weights that lie on a 4-bit grid keep it; numpy makes the grids and judges."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gemma_deploy.quantization.codes import dequantize, quantize
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.quantization.grid import grid_scales, is_on_grid

Weights = npt.NDArray[np.float32]


def on_grid(
    grid_size: int, *, lowest: int = -8, highest: int = 7, rows: int = 64, columns: int = 1024
) -> Weights:
    """Return codes times steps, rounded to bfloat16; one step for `grid_size` weights of a row."""
    random = np.random.default_rng(grid_size)
    codes = random.integers(lowest, highest + 1, (rows, columns // grid_size, grid_size))
    steps = random.uniform(0.001, 0.02, (rows, columns // grid_size, 1)).astype(np.float16)
    signs = random.choice([-1, 1], steps.shape)
    values = torch.from_numpy((codes * (steps.astype(np.float32) * signs)).reshape(rows, columns))
    return values.float().bfloat16().float().numpy()


def relative_error(weight: Weights, weight_format: WeightFormat) -> float:
    quantized = quantize(torch.from_numpy(weight), weight_format)
    found = dequantize(quantized, weight_format).numpy().astype(np.float64)
    return float(np.linalg.norm(found - weight) / np.linalg.norm(weight))


@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize("grid_size", [32, 64, 128, 256, 1024])
@pytest.mark.parametrize("codes", [(-8, 7), (-7, 7), (-2, 3), (-1, 1)])
def test_a_grid_is_kept_where_no_block_of_ours_spans_two_of_its_steps(
    grid_size: int, block_size: int, codes: tuple[int, int]
) -> None:
    weight = on_grid(grid_size, lowest=codes[0], highest=codes[1])
    error = relative_error(weight, WeightFormat("int4", block_size))
    if block_size <= grid_size:
        # bfloat16's own rounding, and float16's of the step.
        assert error < 0.002
    else:
        assert error < 0.3


def test_a_few_large_weights_do_not_hide_the_grid() -> None:
    """Most blocks hold no code as large as the grid allows, as trained weights do."""
    random = np.random.default_rng(0)
    codes = np.clip(np.round(random.normal(0, 1.5, (64, 1024))), -8, 7)
    weight = (codes * np.float16(0.0123)).astype(np.float32)
    assert relative_error(weight, WeightFormat("int4", 32)) < 0.001


def test_random_weights_lie_on_no_grid() -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert not bool(grid_scales(weight.view(256, -1, 32)).any())
    assert not bool(is_on_grid(weight, 32).any())


def test_codes_of_five_bits_are_no_grid_of_four() -> None:
    codes = torch.arange(-8.0, 9.0).repeat(1, 32)[:, :32]
    assert float(grid_scales(codes * 0.01)) == 0
    # Either end alone can be the sixteenth code.
    assert float(grid_scales(codes[:, 1:17] * 0.01)) == pytest.approx(-0.01)
    assert float(grid_scales(codes[:, :16] * 0.01)) == pytest.approx(0.01)


def test_zeros_are_on_any_grid() -> None:
    weight = torch.from_numpy(on_grid(32, rows=4))
    weight[:, :64] = 0
    assert bool(is_on_grid(weight, 32).all())
    weight[2, 100] += 0.0007
    assert is_on_grid(weight, 32).tolist() == [True, True, False, True]

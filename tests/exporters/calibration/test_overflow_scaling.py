"""Smallest sufficient powers of two, and what float16 loses of weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.exporters.calibration.overflow_scaling import power_of_two, weight_losses
from gemma_deploy.residual_scaling import LayerScaling, ResidualScaling


@given(st.floats(min_value=0, max_value=1e30))
def test_power_of_two_is_the_smallest_sufficient(least: float) -> None:
    power = power_of_two(least)
    assert power & (power - 1) == 0
    assert power >= least
    assert power == 1 or power / 2 < least


@pytest.mark.parametrize("divisor", [1, 1024])
def test_losses_are_those_of_numpys_float16(
    divisor: int, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("gemma3")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    shape = tensors[name].shape
    weight = np.exp2(np.random.default_rng(0).uniform(-40, 30, shape)).astype(np.float32)
    weight[0, :6] = (0, 2.0**-25, 2.0**-14, 65519.9, 65520, -65520)
    weight[0, :6] *= divisor
    tensors[name] = weight
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    checkpoint = Checkpoint.open(tmp_path)
    layers = (LayerScaling(), LayerScaling(up=divisor), LayerScaling())
    scaling = ResidualScaling.of(checkpoint.config, 1, layers)
    (loss,) = (x for x in weight_losses(checkpoint, scaling) if x.name == name)

    with np.errstate(over="ignore"):
        stored = (weight / divisor).astype(np.float16)
    is_zeroed = (stored == 0) & (weight != 0)
    assert loss.num_weights == weight.size
    assert loss.divisor == divisor
    assert loss.num_too_large == np.isinf(stored).sum()
    assert loss.num_zeroed == is_zeroed.sum()
    is_small = np.abs(weight / divisor) < np.finfo(np.float16).tiny
    assert loss.num_subnormal == (is_small & ~is_zeroed & (weight != 0)).sum()

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_deploy.exporters.quantization.gptq import Gptq
from gemma_deploy.quantization.codes import dequantize, quantize
from gemma_deploy.quantization.formats import WeightFormat

FORMATS = [WeightFormat("int4", 32), WeightFormat("int4", 128), WeightFormat("int8")]


def correlated_inputs(seed: int, tokens: int = 600, size: int = 128) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator).div(size**0.5)
    # A few channels are loud, as in real models.
    loudness = torch.randn(size, generator=generator).exp()
    return torch.randn(tokens, size, generator=generator) @ mixing * loudness


def output_losses(inputs: Tensor, weight: Tensor, found: Tensor) -> Tensor:
    return (inputs @ (weight - found).T).square().mean(0)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), weight_format=st.sampled_from(FORMATS))
def test_never_worse_than_rounding_to_nearest(seed: int, weight_format: WeightFormat) -> None:
    inputs = correlated_inputs(seed)
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(seed))
    hessian = inputs.T @ inputs / len(inputs)
    found = dequantize(Gptq(hessian.clone()).quantize(weight, weight_format), weight_format)
    nearest = dequantize(quantize(weight, weight_format), weight_format)
    # The solver's Hessian is damped by 1 % of its mean diagonal, against which rows are compared.
    damped = torch.cat((inputs, (0.01 * hessian.diagonal().mean() * 600).sqrt() * torch.eye(128)))
    ours, plain = (output_losses(damped, weight, values) for values in (found, nearest))
    assert bool((ours <= plain * 1.001).all())
    assert ours.sum() < (0.7 if weight_format.scheme == "int4" else 1.0) * plain.sum()


def test_the_target_is_the_least_squares_solution() -> None:
    inputs = correlated_inputs(0).double()
    own_inputs = inputs + 0.1 * correlated_inputs(1).double()
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(2)).double()
    wanted = own_inputs @ weight.T
    mismatch = (wanted - inputs @ weight.T).T @ inputs / len(inputs)
    solver = Gptq((inputs.T @ inputs / len(inputs)).float())
    found = solver.target(weight.float(), mismatch.float()).double()
    # Damping stands for as many more inputs, on which nothing is to change.
    strength = (solver.hessian.double() - inputs.T @ inputs / len(inputs)).diagonal().mean()
    more = (strength * len(inputs)).sqrt() * torch.eye(128, dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat((inputs, more)), torch.cat((wanted, more @ weight.T))
    ).solution.T
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_inputs_that_are_all_zero_are_no_trouble(weight_format: WeightFormat) -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    quantized = Gptq(torch.zeros(128, 128)).quantize(weight, weight_format)
    assert bool(torch.isfinite(dequantize(quantized, weight_format)).all())


def test_fewer_inputs_than_columns_are_no_trouble() -> None:
    inputs = correlated_inputs(0, tokens=5)
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    quantized = Gptq(inputs.T @ inputs / 5).quantize(weight, FORMATS[0])
    assert bool(torch.isfinite(dequantize(quantized, FORMATS[0])).all())

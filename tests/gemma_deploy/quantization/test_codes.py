import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemma_deploy.quantization.codes import (
    NF4_TABLE,
    Quantized,
    dequantize,
    pack,
    quantize,
    unpack,
)
from gemma_deploy.quantization.formats import WeightFormat

FORMATS = ("int4/32", "int4/64", "int8/32", "int8/channel", "nf4/64", "fp8/32", "fp8/channel")
# Scales are float16: they are off by up to 2**-11, and all steps with them.
FLOAT16_SLACK = 1 + 2**-10

matrices = st.builds(
    lambda seed, rows, exponent: (
        torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    ),
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(-6, 4),
)


def steps(quantized: Quantized, text: str) -> Tensor:
    """Return each element's distance between neighbouring values."""
    weight_format = WeightFormat.parse(text)
    wide = quantized.scales.float().abs().repeat_interleave(128 // quantized.scales.shape[1], 1)
    match weight_format.scheme:
        case "nf4":
            gaps = np.diff(NF4_TABLE)
            index = quantized.codes.long()
            wider = torch.tensor(np.maximum(np.r_[0, gaps], np.r_[gaps, 0]), dtype=torch.float32)
            return wide * wider[index]
        case "fp8":
            # Three bits of mantissa; the smallest step of E4M3 is 2**-9.
            magnitude = quantized.codes.float().abs().clamp_min(2.0**-6)
            return wide * 2.0 ** (magnitude.log2().floor() - 3)
        case _:
            return wide


@pytest.mark.parametrize("text", FORMATS)
@given(weight=matrices)
@settings(max_examples=25, deadline=None)
def test_values_are_within_half_a_step(text: str, weight: Tensor) -> None:
    weight_format = WeightFormat.parse(text)
    quantized = quantize(weight, weight_format)
    error = (dequantize(quantized, weight_format) - weight).abs()
    largest = weight.abs().amax() * (FLOAT16_SLACK - 1)
    assert bool((error <= steps(quantized, text) / 2 * FLOAT16_SLACK + largest).all())


@pytest.mark.parametrize("text", FORMATS)
def test_packed_codes_are_unpacked_unchanged(text: str) -> None:
    weight_format = WeightFormat.parse(text)
    codes = quantize(torch.randn(5, 128), weight_format).codes
    stored = pack(codes, weight_format)
    assert stored.shape == weight_format.parts("w", (5, 128))[0].shape
    assert torch.equal(unpack(stored, weight_format).float(), codes.float())


def test_int4_is_packed_as_onnx_packs_it() -> None:
    import onnx

    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 2)
    tensor = onnx.numpy_helper.from_array(codes.numpy().astype(ml_dtypes.int4))
    assert bytes(pack(codes, WeightFormat("int4", 32)).numpy().data) == tensor.raw_data


def test_fp8_is_rounded_as_onnx_rounds_it() -> None:
    import onnx

    weight = torch.randn(3, 128)
    codes, scales = quantize(weight, WeightFormat("fp8"))
    by_onnx = onnx.numpy_helper.saturate_cast(
        (weight / scales.float()).numpy(), np.dtype(ml_dtypes.float8_e4m3fn)
    )
    assert np.array_equal(codes.view(torch.uint8).numpy(), by_onnx.view(np.uint8))


@pytest.mark.parametrize("text", FORMATS)
def test_zeros_stay_zeros_with_a_scale_that_is_none(text: str) -> None:
    weight_format = WeightFormat.parse(text)
    weight = torch.zeros(2, 128)
    weight[1, 0] = 1e-9  # its scale would vanish in float16
    quantized = quantize(weight, weight_format)
    assert bool((quantized.scales != 0).all())
    assert float(dequantize(quantized, weight_format).abs().max()) <= 1e-9


def test_given_scales_are_kept() -> None:
    weight = torch.tensor([[-1.0] * 64 + [0.5] * 64])
    scales = torch.tensor([[0.125, -0.5]], dtype=torch.float16)
    quantized = quantize(weight, WeightFormat("int4", 64), scales)
    assert quantized.scales is scales
    assert set(quantized.codes.flatten().tolist()) == {-8, -1}


def test_rows_do_not_depend_on_each_other() -> None:
    weight = torch.randn(7, 128)
    for text in FORMATS:
        weight_format = WeightFormat.parse(text)
        whole = quantize(weight, weight_format)
        alone = quantize(weight[3:5], weight_format)
        assert torch.equal(whole.codes[3:5].float(), alone.codes.float())
        assert torch.equal(whole.scales[3:5], alone.scales)

"""Ops over quantized weights: written by every lowering and run, against the dequantized weights."""

import functools
import itertools
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from gemma_deploy.exporters.lowering.lower import lower
from gemma_deploy.exporters.lowering.quantized_weight import QuantizedWeight
from gemma_deploy.exporters.lowering.traced_ops import translation_table
from gemma_deploy.exporters.tracing import ir_dtype
from gemma_deploy.graph_spec import LOWERINGS, DType, Lowering
from gemma_deploy.quantization.codes import dequantize, pack, quantize
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.quantization.support import why_not
from tests.rounding import UNIT_ROUNDOFF, assert_near

Array = npt.NDArray[Any]
Float = Literal["float32", "float16"]

FORMATS = [
    *("int4/32", "int4/64", "int4/256", "int8/32", "int8/256", "int8/channel"),
    *("nf4/32", "fp8/64", "fp8/channel"),
]
PRODUCTS = {"int4": "MatMulNBits", "int8": "MatMulNBits", "nf4": "MatMulBnb4", "fp8": "FusedMatMul"}
IDS = torch.tensor([[3, 19, 0], [7, 7, 11]])
NAME = "table"


class Tied(nn.Module):
    """A lookup in a table and a product with it, as a tied embedding has them."""

    def __init__(self, num_columns: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(20, num_columns))
        self.bias = nn.Parameter(torch.linspace(-1, 1, 20))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        rows = nn.functional.embedding(ids, self.table)
        return rows, nn.functional.linear(rows * 0.5, self.table, self.bias)


class Written:
    """A table of random numbers in a file, quantized, and graphs over it.

    Attributes:
        table: float32 [20, K], what the file's codes and scales stand for.
    """

    def __init__(
        self, folder: Path, weight_format: WeightFormat, num_columns: int | None = None
    ) -> None:
        num_columns = num_columns or max(128, weight_format.block_size or 0)
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(20, num_columns, generator=generator)
        weight[4] = 0  # a token that was never trained
        quantized = quantize(weight, weight_format)
        self.table = dequantize(quantized, weight_format).numpy()
        codes = pack(quantized.codes, weight_format).view(torch.uint8).numpy().tobytes()
        # Bytes before it: offsets matter.
        (folder / "weights").write_bytes(b"\xff" * 64 + codes + quantized.scales.numpy().tobytes())
        self._folder, self._format = folder, weight_format
        self._parts = weight_format.parts(NAME, tuple(weight.shape))

    def check_product(self, found: Array, *, is_rounded: bool, dtype: Float = "float32") -> None:
        """Compare a product with numpy's.

        Args:
            found: The product.
            is_rounded: Whether the kernel rounds activations to 1/254 of the largest of a block.
            dtype: What the graph computes in.
        """
        _, wanted = self.wanted()
        # As many sums as columns. In float16, where kernels sum in blocks or wider, its square root.
        columns = self.table.shape[1]
        roundings = columns if dtype == "float32" else columns**0.5
        if is_rounded:
            activations = 0.5 * self.table[IDS.numpy()]
            most = np.abs(activations).max() / 254 * np.abs(self.table).sum(axis=1).max()
            roundings += most / (UNIT_ROUNDOFF[dtype] * np.abs(wanted).max())
        assert_near(found, wanted, roundings=roundings, dtype=dtype)

    def lowered(self, lowering: Lowering, activations: DType = "float32") -> onnx.ModelProto:
        """Return the graph of `Tied` over the file, as text that still points at it."""
        model = traced(self.table.shape[1], activations).clone()
        weight = QuantizedWeight(self._format, self._parts, "weights", 64)
        value = model.graph.initializers.pop(NAME)
        lower(model, lowering, ir_dtype(activations), {value: weight})
        return ir.to_proto(model)

    def run(self, model: onnx.ModelProto) -> list[Array]:
        options = ort.SessionOptions()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._folder)
        )
        # As the package's own sessions do; else ONNX Runtime turns DequantizeLinear into rounding kernels.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return session.run(None, {"ids": IDS.numpy()})  # type: ignore[no-any-return]  # onnxruntime is untyped

    def wanted(self) -> tuple[Array, Array]:
        """Return rows and product by numpy."""
        rows = self.table[IDS.numpy()]
        bias = np.linspace(-1, 1, 20, dtype=np.float32)
        return rows, rows * 0.5 @ self.table.T + bias


@functools.cache
def traced(num_columns: int, activations: DType) -> ir.Model:
    module = Tied(num_columns).to(getattr(torch, activations))
    with warnings.catch_warnings():
        # torch's exporter uses what torch has deprecated.
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), (IDS,))
        onnx_program = torch.onnx.export(
            program, opset_version=23, dynamo=True, optimize=False, verbose=False,
            custom_translation_table=translation_table(),
        )  # fmt: skip
    assert onnx_program is not None
    return onnx_program.model


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("text", FORMATS)
def test_every_lowering_means_the_dequantized_weights(text: str, tmp_path: Path) -> None:
    weight_format = WeightFormat.parse(text)
    written = Written(tmp_path, weight_format)
    rows, _ = written.wanted()
    for lowering in LOWERINGS:
        if why_not(lowering, weight_format):
            continue
        model = written.lowered(lowering)
        found = written.run(model)
        assert_near(found[0], rows, roundings=2)  # a code times its scale, on each side
        written.check_product(found[1], is_rounded="MatMulNBits" in op_types(model))


@pytest.mark.parametrize("text", FORMATS)
def test_float16_graphs(text: str, tmp_path: Path) -> None:
    weight_format = WeightFormat.parse(text)
    written = Written(tmp_path, weight_format)
    rows, _ = written.wanted()
    for lowering in LOWERINGS:
        if why_not(lowering, weight_format):
            continue
        model = written.lowered(lowering, "float16")
        found = written.run(model)
        assert [x.dtype for x in found] == [np.float16] * 2
        # The scale is float16; its product with a code is rounded, by 2^-11 of itself.
        np.testing.assert_allclose(found[0], rows, rtol=1e-3, atol=1e-6)
        is_rounded = "MatMulNBits" in op_types(model)
        written.check_product(found[1], is_rounded=is_rounded, dtype="float16")


@pytest.mark.parametrize("text", FORMATS)
def test_onnxruntime_multiplies_with_codes_where_it_can(text: str, tmp_path: Path) -> None:
    model = Written(tmp_path, WeightFormat.parse(text)).lowered("onnxruntime")
    assert PRODUCTS[text.partition("/")[0]] in op_types(model)
    assert ("DequantizeLinear" in op_types(model)) == text.startswith("fp8")


@pytest.mark.parametrize("text", ["int4/32", "int8/32", "int8/channel"])
def test_mat_mul_n_bits_rounds_activations_by_blocks(text: str, tmp_path: Path) -> None:
    """The kernel's own definition: int8 activations, a scale per block; nothing else is lost."""
    written = Written(tmp_path, WeightFormat.parse(text))
    product = written.run(written.lowered("onnxruntime"))[1]
    blocks = (0.5 * written.table[IDS.numpy()]).reshape(2, 3, -1, 32)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    steps = blocks / np.where(scales == 0, 1, scales)
    wanted = (np.rint(steps) * scales).reshape(2, 3, -1) @ written.table.T + np.linspace(-1, 1, 20)
    # Half way between two steps, as a code of 4 is in a block that reaches -8, either is right.
    is_between = np.abs(steps - np.floor(steps) - 0.5) < 1e-3
    either = (is_between * scales).reshape(2, 3, -1) @ np.abs(written.table.T)
    # Codes and 128 products of each row, summed in float32; scales of blocks by one rounding.
    roundings = 128 * UNIT_ROUNDOFF["float32"] * np.abs(wanted).max()
    assert np.all(np.abs(product - wanted) <= roundings + either)
    assert is_between.mean() < 0.2


@pytest.mark.parametrize(
    ("num_columns", "product"), [(96, "MatMulNBits"), (48, "MatMulNBits"), (24, "FusedMatMul")]
)
def test_rows_of_one_scale_that_kernels_cut_or_not(
    num_columns: int, product: str, tmp_path: Path
) -> None:
    written = Written(tmp_path, WeightFormat("int8"), num_columns)
    model = written.lowered("onnxruntime")
    assert product in op_types(model)
    written.check_product(written.run(model)[1], is_rounded=product == "MatMulNBits")


@pytest.mark.parametrize("text", FORMATS)
def test_portable_graphs_mean_the_same_to_onnx(text: str, tmp_path: Path) -> None:
    written = Written(tmp_path, WeightFormat.parse(text))
    model = written.lowered("portable")
    onnx.load_external_data_for_model(model, str(tmp_path))
    onnx.checker.check_model(model, full_check=True)
    found: list[Any] = list(ReferenceEvaluator(model).run(None, {"ids": IDS.numpy()}))
    assert_near(found[0], written.wanted()[0], roundings=2)
    written.check_product(found[1], is_rounded=False)


@pytest.mark.parametrize("text", FORMATS)
def test_forms_of_a_weight_share_its_bytes(text: str, tmp_path: Path) -> None:
    weight_format = WeightFormat.parse(text)
    written = Written(tmp_path, weight_format)
    parts = weight_format.parts(NAME, written.table.shape)
    places = {(64, parts[0].size_bytes), (64 + parts[0].size_bytes, parts[1].size_bytes)}
    for lowering in LOWERINGS:
        if why_not(lowering, weight_format):
            continue
        entries = [
            {entry.key: entry.value for entry in tensor.external_data}
            for tensor in written.lowered(lowering).graph.initializer
            if tensor.name != "bias"
        ]
        assert {(int(x["offset"]), int(x["length"])) for x in entries} == places


def test_int4_codes_are_packed_as_onnx_packs_them() -> None:
    codes = np.array(list(itertools.product(range(-8, 8), repeat=2)), np.int8)
    stored = pack(torch.from_numpy(codes), WeightFormat("int4", 32)).numpy()
    tensor = helper.make_tensor("codes", TensorProto.INT4, codes.shape, codes.flatten())
    # In int32_data, a byte each.
    assert bytes(byte & 0xFF for byte in tensor.int32_data) == stored.tobytes()
    tensor = helper.make_tensor("codes", TensorProto.INT4, codes.shape, stored.tobytes(), raw=True)
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), codes)


def test_what_tensorrt_does_not_take() -> None:
    reason = why_not("tensorrt", WeightFormat("nf4", 64))
    assert reason is not None
    assert "no nf4: use int4, int8 or fp8" in reason
    assert why_not("tensorrt", WeightFormat("int4", 64)) is None
    assert why_not("portable", WeightFormat("nf4", 64)) is None

"""Each op by itself: written by every lowering and run, against torch's meaning of it."""

import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from gemma_deploy.exporters.lowering.lower import lower
from gemma_deploy.exporters.lowering.traced_ops import translation_table
from gemma_deploy.exporters.tracing import ir_dtype
from gemma_deploy.graph_spec import LOWERINGS, DType, Lowering
from gemma_deploy.ops.static_cache_attention import static_cache_attention
from tests.rounding import assert_near

HEAD_DIM, CAPACITY = 16, 32
PRODUCTS: dict[Lowering, list[str]] = {
    "onnxruntime": ["FusedMatMul"],
    "tensorrt": ["Transpose", "MatMul"],
    "portable": ["Transpose", "MatMul"],
}


class Attention(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.attributes = attributes

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor] = static_cache_attention(*tensors, **self.attributes)
        return outputs


class Head(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 5, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.linear(self.embedding(ids))
        return output


def traced(module: nn.Module, inputs: tuple[Tensor, ...], dynamic: Any = None) -> ir.Model:
    with warnings.catch_warnings():
        # torch's exporter uses what torch has deprecated.
        warnings.simplefilter("ignore")
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=dynamic)
        onnx_program = torch.onnx.export(
            program, opset_version=23, dynamo=True, optimize=False, verbose=False,
            custom_translation_table=translation_table(),
        )  # fmt: skip
    assert onnx_program is not None
    return onnx_program.model


def lowered(model: ir.Model, lowering: Lowering, activations: DType = "float32") -> ir.Model:
    model = unchecked(model, lowering, activations)
    onnx.checker.check_model(ir.to_proto(model))
    return model


def unchecked(model: ir.Model, lowering: Lowering, activations: DType) -> ir.Model:
    """Lower a model whose initializers were only declared to be of another dtype."""
    model = model.clone()
    lower(model, lowering, ir_dtype(activations))
    return model


def run(model: ir.Model, inputs: tuple[Tensor, ...]) -> list[Any]:
    proto = ir.to_proto(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))  # type: ignore[no-any-return]  # onnxruntime is untyped


def attention_inputs(
    input_pos: list[int], num_tokens: int, heads: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    batch, (num_heads, num_kv_heads) = len(input_pos), heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    steps = torch.tensor(input_pos)[:, None] + torch.arange(num_tokens)
    angles = steps[..., None] / 10.0 ** torch.arange(HEAD_DIM // 2)
    kv, cache = (batch, num_tokens, num_kv_heads), (batch, num_kv_heads, CAPACITY)
    return (
        draw(batch, num_tokens, num_heads, HEAD_DIM), draw(*kv, HEAD_DIM), draw(*kv, HEAD_DIM),
        draw(*cache, HEAD_DIM), draw(*cache, HEAD_DIM),
        angles.cos().to(dtype), angles.sin().to(dtype), torch.tensor(input_pos),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "attributes"),
    [
        ((4, 1), {"scale": 0.5}),
        ((4, 2), {"scale": 1.0, "softcap": 2.0, "sliding_window": 5}),
        ((2, 2), {"scale": 0.25, "sliding_window": 1}),
    ],
    ids=["mqa", "gqa-softcap-window", "mha-window-of-one"],
)
def test_attention(heads: tuple[int, int], attributes: dict[str, Any]) -> None:
    batch, tokens = Dim("B"), Dim("S")
    step = {0: batch, 1: tokens}
    dynamic = ((step, step, step, {0: batch}, {0: batch}, step, step, {0: batch}),)
    example = attention_inputs([0, 0], 3, heads, torch.float32)
    model = traced(Attention(**attributes), example, dynamic)
    for lowering in LOWERINGS:
        # Prefill, a chunk of one row, ragged decode, and ragged chunks.
        steps = [([0, 0], 12), ([7], 9), ([0, 4, 30], 1), ([0, 3, 20], 9)]
        if lowering == "onnxruntime":
            steps.pop()  # its attention continues by several tokens one row at a time
        for input_pos, num_tokens in steps:
            check_attention(lowered(model, lowering), input_pos, num_tokens, heads, attributes)


def check_attention(
    model: ir.Model,
    input_pos: list[int],
    num_tokens: int,
    heads: tuple[int, int],
    attributes: dict[str, Any],
) -> None:
    inputs = attention_inputs(input_pos, num_tokens, heads, torch.float32)
    wanted = static_cache_attention(*inputs, **attributes)
    output, *caches = run(model, inputs)
    # Sums over the numbers of a head and over positions, and a few factors.
    assert_near(output, wanted[0], roundings=HEAD_DIM + CAPACITY + 8)
    for row, start in enumerate(input_pos):
        stop = start + num_tokens
        for ours, theirs in zip(caches, wanted[1:], strict=True):
            # A rotation: two products and their sum, on each side.
            assert_near(ours[row, :, :stop], theirs[row, :, :stop], roundings=8)


def test_attention_in_float16() -> None:
    inputs = attention_inputs([0, 0], 12, (4, 1), torch.float16)
    exact = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    wanted, *_ = static_cache_attention(*exact, scale=0.5)
    model = traced(Attention(scale=0.5), inputs)
    for lowering in LOWERINGS:
        output, *_ = run(lowered(model, lowering, "float16"), inputs)
        assert output.dtype == np.float16
        # Rotated queries and keys, scores, weights and outputs, and sums by blocks where a processor
        # sums in float16.
        assert_near(output, wanted, roundings=16, dtype="float16")


@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_embedding(bias: bool) -> None:
    module, ids = Head(bias=bias), torch.tensor([[3, 19, 0]])
    model = traced(module, (ids,))
    for lowering in LOWERINGS:
        (output,) = run(lowered(model, lowering), (ids,))
        assert_near(output, module(ids).detach(), roundings=2 * 8)  # 8 products, on each side


@pytest.mark.parametrize("bias", [False, True])
def test_linear_and_embedding_over_bfloat16_weights(bias: bool) -> None:
    """The graph is traced in float32; its matrices are then stored in bfloat16."""
    module, ids = Head(bias=bias), torch.tensor([[3, 19, 0]])
    model = traced(module, (ids,))
    rounded = {"embedding.weight": module.embedding.weight, "linear.weight": module.linear.weight}
    for name, weight in rounded.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(weight.detach().bfloat16(), name=name)
        value.dtype = ir.DataType.BFLOAT16
        weight.data = weight.data.bfloat16().float()
    for lowering in LOWERINGS:
        (output,) = run(lowered(model, lowering), (ids,))
        assert_near(output, module(ids).detach(), roundings=2 * 8)  # 8 products, on each side


def test_weights_are_used_as_stored() -> None:
    """[out, in], and without a cast of the table that rows are looked up in."""
    ids = torch.tensor([[1]])
    model = traced(Head(bias=True), (ids,))
    for dtype, num_casts in ((ir.DataType.FLOAT, 0), (ir.DataType.BFLOAT16, 2)):
        stored = model.clone()
        for name in ("embedding.weight", "linear.weight"):
            stored.graph.initializers[name].dtype = dtype
        for lowering, product in PRODUCTS.items():
            graph = unchecked(stored, lowering, "float32").graph
            op_types = [node.op_type for node in graph if node.op_type != "Cast"]
            assert op_types == ["Gather", *product, "Add"]
            assert sum(node.op_type == "Cast" for node in graph) == num_casts
            gather = next(node for node in graph if node.op_type == "Gather")
            assert gather.inputs[0] is graph.initializers["embedding.weight"]


def test_biases_that_are_stored_wider_than_the_activations() -> None:
    """As in TensorRT graphs of a bfloat16 bundle."""
    module, ids = Head(bias=True).bfloat16(), torch.tensor([[1]])
    model = traced(module, (ids,))
    model.graph.initializers["linear.bias"].dtype = ir.DataType.FLOAT
    graph = unchecked(model, "tensorrt", "bfloat16").graph
    (cast,) = (node for node in graph if node.op_type == "Cast")
    assert cast.inputs[0] is graph.initializers["linear.bias"]
    assert cast.attributes.get_int("to") == ir.DataType.BFLOAT16

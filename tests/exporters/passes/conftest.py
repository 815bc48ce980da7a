"""A step of attention layers as a TensorRT graph of a bundle has it, without the rest of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from gemma_deploy.exporters.lowering.gemma_attention import gemma_attention_function
from gemma_deploy.exporters.lowering.nodes import NodeWriter

HEADS, KV_HEADS, SIZE = 4, 2, 16


@dataclass(frozen=True)
class Layer:
    """Attributes of a layer's attention."""

    scale: float = 0.3
    softcap: float = 0.0
    sliding_window: int = 0


def tensor(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def build(layers: list[Layer], dtype: ir.DataType) -> ir.Model:
    """Return a graph (query, input_pos, key and value cache) -> (output of each layer, caches)."""
    cache: list[int | str] = ["B", KV_HEADS, "T", SIZE]
    query = tensor("query", dtype, ["B", "S", HEADS, SIZE])
    input_pos = tensor("input_pos", ir.DataType.INT32, ["B"])
    caches = [tensor(f"past_{part}", dtype, cache) for part in ("key", "value")]
    write = NodeWriter()
    present = [write.op("Identity", past) for past in caches]
    for value, part in zip(present, ("key", "value"), strict=True):
        value.name, value.dtype, value.shape = f"present_{part}", dtype, ir.Shape(cache)
    outputs = []
    for number, layer in enumerate(layers):
        output = write.op(
            "GemmaAttention", query, *present, input_pos, domain="gemma_deploy", scale=layer.scale,
            softcap=layer.softcap, sliding_window=layer.sliding_window,
        )  # fmt: skip
        output.name, output.dtype, output.shape = f"output_{number}", dtype, query.shape
        outputs.append(output)
    graph = ir.Graph(
        [query, input_pos, *caches], [*outputs, *present], nodes=write.nodes,
        opset_imports={"": 24, "gemma_deploy": 1}, name="layers",
    )  # fmt: skip
    return ir.Model(graph, ir_version=11, functions=[gemma_attention_function()])


@pytest.fixture
def attention_model() -> Callable[..., ir.Model]:
    """Return `attention_model(layers, dtype=FLOAT16) -> model`; a layer is a dict of attributes."""

    def get(layers: list[dict[str, Any]], dtype: ir.DataType = ir.DataType.FLOAT16) -> ir.Model:
        return build([Layer(**layer) for layer in layers], dtype)

    return get


@pytest.fixture
def run_model() -> Callable[..., list[Any]]:
    """Return `run_model(model, feeds) -> outputs`, on ONNX Runtime's CPU."""

    def run(model: ir.Model, feeds: dict[str, Any]) -> list[Any]:
        serialized = ir.to_proto(model).SerializeToString()
        session = ort.InferenceSession(serialized, providers=["CPUExecutionProvider"])
        return session.run(None, feeds)  # type: ignore[no-any-return]  # onnxruntime is untyped

    return run


@pytest.fixture
def step() -> dict[str, Any]:
    """Three rows of different lengths that take 5 tokens each; garbage beyond them."""
    random = np.random.default_rng(0)
    shapes = {
        "query": (3, 5, HEADS, SIZE),
        "past_key": (3, KV_HEADS, 24, SIZE),
        "past_value": (3, KV_HEADS, 24, SIZE),
    }
    feeds = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return feeds | {"input_pos": np.array([0, 7, 19], np.int32)}


@pytest.fixture
def expected(step: dict[str, Any]) -> Callable[..., Any]:
    """Return `expected(layer) -> output`: attention written out in numpy, query by query."""

    def attend(layer: dict[str, Any]) -> Any:
        rules = Layer(**layer)
        output = np.zeros(step["query"].shape)
        for row, tokens, head in np.ndindex(3, 5, HEADS):
            kv = head // (HEADS // KV_HEADS)
            last = step["input_pos"][row] + tokens
            first = max(0, last - rules.sliding_window + 1) if rules.sliding_window else 0
            keys, values = (
                step[name][row, kv, first : last + 1] for name in ("past_key", "past_value")
            )
            scores = keys @ step["query"][row, tokens, head] * rules.scale
            if rules.softcap:
                scores = rules.softcap * np.tanh(scores / rules.softcap)
            weights = np.exp(scores - scores.max())
            output[row, tokens, head] = weights / weights.sum() @ values
        return output

    return attend

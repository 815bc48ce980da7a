from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from gemma_deploy.config import GemmaConfig
from gemma_deploy.engine_build import EngineLimits, engine_spec
from gemma_deploy.exporters.passes.top_logits import add_top_logits
from tests.rounding import assert_near

LIMITS = EngineLimits(
    max_batch_size=1, max_seq_len=16, max_step_tokens=8, max_logits=2, num_candidates=3
)


@pytest.fixture
def model() -> ir.Model:
    """Logits that are given, and a cache that comes after them."""
    x, y = (
        ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "L", 50]))
        for name in ("x", "logits")
    )
    node = ir.Node("", "Neg", [x], outputs=[y])
    cache = ir.Value(name="present.0.key", type=x.type, shape=x.shape)
    other = ir.Node("", "Identity", [x], outputs=[cache])
    graph = ir.Graph([x], [y, cache], nodes=[node, other], opset_imports={"": 24}, name="head")
    return ir.Model(graph, ir_version=11)


def test_the_largest_logits_and_their_sum(
    model: ir.Model, run_model: Callable[..., list[Any]]
) -> None:
    add_top_logits(model, 3)
    x = np.random.default_rng(0).normal(size=(2, 4, 50)).astype(np.float32)
    logits, top, indices, total, _ = run_model(model, {"x": x})
    order = np.argsort(-logits, axis=-1)[..., :3]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(top, np.take_along_axis(logits, order, axis=-1))
    # 50 logits are summed, each up to three times as large as most sums.
    assert_near(total, logits.astype(np.float64).sum(axis=-1), roundings=50)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_logit_that_is_not_finite_shows_in_the_sum(
    value: float, model: ir.Model, run_model: Callable[..., list[Any]]
) -> None:
    add_top_logits(model, 3)
    x = np.zeros((2, 2, 50), np.float32)
    x[1, 0, 49] = value
    _, _, _, total, _ = run_model(model, {"x": x})
    assert np.isfinite(total).tolist() == [[True, True], [False, True]]


def test_outputs_are_those_of_the_engine_spec(model: ir.Model) -> None:
    """Names, order, dtypes and shapes, stated elsewhere."""
    add_top_logits(model, 3)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    config = GemmaConfig(vocab_size=50, num_hidden_layers=1)
    spec = engine_spec(config, "prefill", "float16", LIMITS)
    for value, tensor in zip(model.graph.outputs[:4], spec.outputs[:4], strict=True):
        assert value.name == tensor.name
        assert value.dtype is not None
        assert str(value.dtype.numpy()) == tensor.dtype
        sizes = [size if isinstance(size, int) else str(size) for size in value.shape or ()]
        assert tuple(sizes) == tensor.dims
    assert model.graph.outputs[4].name == "present.0.key"

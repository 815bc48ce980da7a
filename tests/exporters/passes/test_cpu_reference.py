"""What TensorRT graphs mean, against attention written out in numpy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from gemma_deploy.engine_build import Attention
from gemma_deploy.errors import ExportError
from gemma_deploy.exporters.passes.attention import use_attention
from gemma_deploy.exporters.passes.cpu_reference import use_cpu_reference
from tests.rounding import assert_near

LAYERS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 4},
    {"sliding_window": 1},
    {"softcap": 0.5},
    {"softcap": 0.7, "sliding_window": 6, "scale": 1.5},
]


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("attention", [None, "native", "plugin", "auto"])
def test_every_form_of_attention(
    dtype: ir.DataType,
    attention: Attention | None,
    attention_model: Callable[..., ir.Model],
    run_model: Callable[..., list[Any]],
    step: dict[str, Any],
    expected: Callable[..., Any],
) -> None:
    layers = LAYERS if attention != "native" else LAYERS[:3]
    model = attention_model(layers, dtype)
    if attention is not None:
        use_attention(model, attention)
    use_cpu_reference(model)
    outputs = run_model(model, step)
    for layer, output in zip(layers, outputs, strict=False):
        assert output.dtype == np.float32
        scale = layer.get("scale", 0.3)
        # Native attention scales the query by a number of 16 bits.
        rounded = float(ir.tensor(scale, dtype=dtype).numpy())
        is_native = attention == "native" or (attention == "auto" and not layer)
        wanted = expected(layer | {"scale": rounded if is_native else scale})
        assert_near(output, wanted, roundings=40)  # sums over a head and over positions


def test_weights_keep_their_bytes(
    attention_model: Callable[..., ir.Model],
    run_model: Callable[..., list[Any]],
    step: dict[str, Any],
) -> None:
    """They are cast in the graph: a file of 16 bits is read where it is."""
    model = attention_model([{}])
    factor = ir.Value(
        name="factor", const_value=ir.tensor(np.array([2.5], np.float16), name="factor"),
        type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([1]),
    )  # fmt: skip
    model.graph.initializers.add(factor)
    (node,) = (node for node in model.graph if node.op_type == "GemmaAttention")
    output = node.outputs[0]
    scaled = ir.Node("", "Mul", [output, factor], num_outputs=1)
    scaled.outputs[0].name, scaled.outputs[0].dtype = "scaled", ir.DataType.FLOAT16
    scaled.outputs[0].shape = output.shape
    model.graph.append(scaled)
    model.graph.outputs[0] = scaled.outputs[0]
    model.graph.outputs.append(output)
    use_cpu_reference(model)
    assert model.graph.initializers["factor"].dtype == ir.DataType.FLOAT16
    outputs = run_model(model, step)
    np.testing.assert_allclose(outputs[0], outputs[-1] * 2.5, rtol=1e-6)


def test_native_attention_of_another_form(attention_model: Callable[..., ir.Model]) -> None:
    """What it means is not guessed."""
    model = attention_model([{}])
    use_attention(model, "native")
    (node,) = (node for node in model.graph if node.op_type == "TRT_Attention")
    node.attributes["causal_kind"] = ir.AttrString("causal_kind", "upper_left")
    with pytest.raises(
        ExportError, match=r"causal_kind 'upper_left' and 4 inputs; expected a mask"
    ):
        use_cpu_reference(model)

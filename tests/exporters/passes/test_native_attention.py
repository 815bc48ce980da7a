from collections.abc import Callable

import onnx_ir as ir
import pytest

from gemma_deploy.errors import RequestError
from gemma_deploy.exporters.passes.native_attention import use_native_attention


def natives(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == ("trt", "TRT_Attention")]


def test_rows_are_told_their_lengths(attention_model: Callable[..., ir.Model]) -> None:
    """Never by nonpad_kv_seqlen, which TensorRT ignores; and with no attribute it does not know."""
    model = attention_model([{}])
    use_native_attention(model)
    (node,) = natives(model)
    assert node.attributes.keys() == {"causal_kind"}
    assert node.attributes.get_string("causal_kind") == "lower_right"
    assert [value is not None for value in node.inputs] == [True, True, True, False, False, True]
    assert node.inputs[1] is model.graph.outputs[1]
    assert model.graph.opset_imports["trt"] == 1
    assert not [node for node in model.graph if node.op_type == "GemmaAttention"]


def test_the_query_is_scaled_in_its_own_dtype(attention_model: Callable[..., ir.Model]) -> None:
    for dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        model = attention_model([{"scale": 0.0625}], dtype)
        use_native_attention(model)
        (product,) = (node for node in model.graph if node.op_type == "Mul")
        assert product.inputs[1] is not None
        scale = ir.convenience.get_const_tensor(product.inputs[1])
        assert scale is not None
        assert scale.dtype == dtype
        assert float(scale.numpy()) == 0.0625


def test_a_window_is_a_mask(attention_model: Callable[..., ir.Model]) -> None:
    """A mask together with a causal kind is refused by the parser."""
    model = attention_model([{"sliding_window": 3}])
    use_native_attention(model)
    (node,) = natives(model)
    assert len(node.inputs) == 4
    assert node.attributes.get_string("causal_kind") == "none"


def test_a_softcap_is_refused_and_nothing_is_changed(
    attention_model: Callable[..., ir.Model],
) -> None:
    model = attention_model([{}, {"softcap": 50.0}, {"softcap": 50.0, "sliding_window": 3}])
    message = r"2 layers cap attention scores \(softcap\), .* take --attention auto or plugin"
    with pytest.raises(RequestError, match=message) as caught:
        use_native_attention(model)
    assert caught.value.exit_code == 2
    assert not natives(model)


def test_special_layers_can_be_left(attention_model: Callable[..., ir.Model]) -> None:
    model = attention_model([{"softcap": 50.0}, {}, {"sliding_window": 3}])
    use_native_attention(model, leave_special=True)
    kinds = [node.op_type for node in model.graph if node.op_type.endswith("Attention")]
    assert kinds == ["GemmaAttention", "TRT_Attention", "GemmaAttention"]

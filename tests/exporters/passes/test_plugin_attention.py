from collections.abc import Callable

import onnx_ir as ir

from gemma_deploy.exporters.passes.plugin_attention import use_plugin_attention


def test_nodes_name_the_plugin_and_nothing_else_can_be_meant(
    attention_model: Callable[..., ir.Model],
) -> None:
    model = attention_model([{"softcap": 50.0}, {"sliding_window": 3}])
    assert use_plugin_attention(model)
    assert not model.functions
    nodes = [node for node in model.graph if node.op_type == "GemmaAttention"]
    assert len(nodes) == 2
    for node in nodes:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        assert attributes["plugin_namespace"] == "gemma_deploy"
        assert attributes["plugin_version"] == "1"
        # All of them, since defaults of a function do not reach a plugin.
        assert {"scale", "softcap", "sliding_window"} < attributes.keys()


def test_without_such_nodes_there_is_no_need(attention_model: Callable[..., ir.Model]) -> None:
    model = attention_model([])
    assert not use_plugin_attention(model)
    assert not model.functions
    assert model.graph.opset_imports.keys() == {""}

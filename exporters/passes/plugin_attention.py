"""Attention by our plugin: `use_plugin_attention`."""

from typing import Final

import onnx_ir as ir

from gemma_deploy.exporters.lowering import gemma_attention
from gemma_deploy.plugins.attention import PLUGIN_NAMESPACE, PLUGIN_VERSION

# What the parser looks plugins up by; without them it would not find one in a namespace.
_PLUGIN: Final = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}


def use_plugin_attention(model: ir.Model) -> bool:
    """Make the remaining GemmaAttention nodes resolve to the plugin of that name.

    The function that says what they mean is taken out, so that nothing but the plugin can be meant.

    Args:
        model: A TensorRT graph of a bundle; changed.

    Returns:
        Whether there are any, and the plugin is needed.
    """
    nodes = [node for node in model.graph if gemma_attention.is_gemma_attention(node)]
    for node in nodes:
        node.attributes.update({k: ir.AttrString(k, v) for k, v in _PLUGIN.items()})
    model.functions.clear()
    if not nodes:
        model.graph.opset_imports.pop(gemma_attention.DOMAIN, None)
    return bool(nodes)

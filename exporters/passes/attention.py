"""Choosing what computes each layer's attention: `use_attention`."""

import onnx_ir as ir

from gemma_deploy.engine_build import Attention
from gemma_deploy.exporters.passes.native_attention import use_native_attention
from gemma_deploy.exporters.passes.plugin_attention import use_plugin_attention


def use_attention(model: ir.Model, attention: Attention, *, has_native: bool = True) -> bool:
    """Replace every GemmaAttention node by native attention or by the plugin.

    Args:
        model: A TensorRT graph of a bundle; changed.
        attention: `native`; `plugin`; or `auto`: native where it can, which is in layers without
            softcap and sliding window, and the plugin in the others.
        has_native: Whether the library has native attention; if not, `auto` is `plugin`.

    Returns:
        Whether any layer needs the plugin.

    Raises:
        RequestError: `native`, and a layer caps its scores.
    """
    if attention == "native" or (attention == "auto" and has_native):
        use_native_attention(model, leave_special=attention == "auto")
    return use_plugin_attention(model)

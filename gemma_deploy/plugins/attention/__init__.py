"""The attention plugin `GemmaAttention` for TensorRT, and the Triton kernels it runs."""

from gemma_deploy.plugins.attention.plugin import (
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    register_plugin,
)
from gemma_deploy.plugins.attention.plugin_fields import PLUGIN_NAME

__all__ = ["PLUGIN_NAME", "PLUGIN_NAMESPACE", "PLUGIN_VERSION", "register_plugin"]

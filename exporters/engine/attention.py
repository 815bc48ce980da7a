"""Which kernels compute attention in an engine: TensorRT's own, or our plugin's."""

from typing import Final

from gemma_deploy.config import GemmaConfig
from gemma_deploy.engine import Attention
from gemma_deploy.errors import RequestError
from gemma_deploy.tensorrt import TensorRTLibrary

# The ONNX parser knows TRT_Attention where the API knows its masks: TensorRT 11, RTX 1.5.
_NATIVE_FEATURE: Final = "CausalMaskKind"


def native_layers(
    config: GemmaConfig, attention: Attention, library: TensorRTLibrary
) -> frozenset[int]:
    """Return the layers whose attention TensorRT's own kernels compute; the plugin has the others.

    Args:
        config: The model.
        attention: `native`: all layers. `plugin`: none. `auto`: those without a softcap and without
            a window, if the library has a kernel.
        library: What builds.

    Raises:
        RequestError: `native`, and the library or TensorRT as a whole has no such kernel.
    """
    layers = range(config.num_hidden_layers)
    has_kernel = hasattr(library.module, _NATIVE_FEATURE)
    if attention == "plugin":
        return frozenset()
    if attention == "native":
        _check_native(config, library, has_kernel=has_kernel)
        return frozenset(layers)
    if not has_kernel or config.attn_logit_softcapping is not None:
        return frozenset()
    return frozenset(layer for layer in layers if config.window_of(layer) is None)


def _check_native(config: GemmaConfig, library: TensorRTLibrary, *, has_kernel: bool) -> None:
    if config.attn_logit_softcapping is not None:
        raise RequestError(
            f"the model caps attention scores at {config.attn_logit_softcapping:g} in all "
            f"{config.num_hidden_layers} layers, which TensorRT's own attention cannot: take "
            "--attention auto or plugin"
        )
    if not has_kernel:
        raise RequestError(
            f"{library.flavour} {library.version} has no attention for a KV cache (TensorRT 11 and "
            "TensorRT for RTX 1.5 do): take --attention auto or plugin, or upgrade it"
        )

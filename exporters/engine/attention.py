"""Which kernels compute attention in an engine: TensorRT's own, or our plugin's."""

import importlib.util
from collections.abc import Sequence
from typing import Final

from gemma_deploy.config import GemmaConfig
from gemma_deploy.engine_build import Attention
from gemma_deploy.errors import BackendUnavailableError, RequestError
from gemma_deploy.plugins.attention.schedule import (
    SHARED_LIMIT_BYTES,
    KernelDType,
    KernelShape,
)
from gemma_deploy.tensorrt import TensorRTLibrary

# The ONNX parser knows TRT_Attention where the API knows its masks: TensorRT 11, RTX 1.5.
_NATIVE_FEATURE: Final = "CausalMaskKind"


def check_attention(config: GemmaConfig, attention: Attention, library: TensorRTLibrary) -> None:
    """Refuse native attention where TensorRT has none.

    Raises:
        RequestError: The model caps attention scores, or the library is too old.
    """
    if attention != "native":
        return
    if config.attn_logit_softcapping is not None:
        raise RequestError(
            f"the model caps attention scores at {config.attn_logit_softcapping:g} in all "
            f"{config.num_hidden_layers} layers, which TensorRT's own attention cannot: take "
            "--attention auto or plugin"
        )
    if not has_native_attention(library):
        raise RequestError(
            f"{library.flavour} {library.version} has no attention over a KV cache (TensorRT 11 and "
            "TensorRT for RTX 1.5 do): take --attention auto or plugin, or upgrade it"
        )


def has_native_attention(library: TensorRTLibrary) -> bool:
    """Tell whether a library can attend over a KV cache that is filled in part."""
    return hasattr(library.module, _NATIVE_FEATURE)


def uses_plugin(config: GemmaConfig, attention: Attention, library: TensorRTLibrary) -> bool:
    """Tell whether any layer's attention is the plugin's: for `auto`, where native has no kernel."""
    if attention != "auto":
        return attention == "plugin"
    has_window = any(config.window_of(i) is not None for i in range(config.num_hidden_layers))
    has_softcap = config.attn_logit_softcapping is not None
    return has_softcap or has_window or not has_native_attention(library)


def check_plugin(config: GemmaConfig, dtype: KernelDType, targets: Sequence[str]) -> None:
    """Refuse what the plugin has no kernels for: a plugin that fails inside a build ends its process.

    Args:
        config: The model.
        dtype: What the engine computes in.
        targets: Compute capabilities such as `8.9`.

    Raises:
        RequestError: The model's heads, or a target.
        BackendUnavailableError: The compiler of its kernels is not installed.
    """
    known = [f"{capability // 10}.{capability % 10}" for capability in SHARED_LIMIT_BYTES]
    missing = [target for target in targets if target not in known]
    if missing:
        raise RequestError(
            f"the attention plugin has no kernels for compute capability {', '.join(missing)}; it "
            f"has for {', '.join(known)}: leave it out, or take --attention native"
        )
    KernelShape(  # refuses the heads it has no kernels for
        head_dim=config.head_dim,
        group=config.num_attention_heads // config.num_key_value_heads,
        dtype=dtype,
        has_softcap=config.attn_logit_softcapping is not None,
    )
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailableError(
            "the attention plugin's kernels are compiled with Triton, which is not installed: "
            "pip install triton (Linux), or take --attention native"
        )

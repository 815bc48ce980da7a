"""What a bundle's weights mean, as a torch model: `load_bundle_model`, `load_cache_scales`."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gemma_deploy.bundle import Bundle
from gemma_deploy.errors import BundleError
from gemma_deploy.graph_spec import cache_scale_names
from gemma_deploy.manifest import Manifest
from gemma_deploy.model.attend import AttentionImplementation
from gemma_deploy.model.heads import GemmaForCausalLM
from gemma_deploy.model.norm import RMSNorm
from gemma_deploy.quantization.codes import Quantized, dequantize, unpack
from gemma_deploy.quantization.formats import scales_name

# float32 of the rows that are widened at a time.
_BLOCK_BYTES = 64 << 20


def load_bundle_model(
    bundle: Bundle, *, attn_implementation: AttentionImplementation = "eager"
) -> GemmaForCausalLM:
    """Build the float32 model that a bundle's weights stand for.

    Codes are multiplied with their scales, and what was divided by powers of two so that float16 holds
    it (`ResidualScaling`) is multiplied back; both are exact but for one rounding to float32. The
    model so computes, on its own arithmetic, what the bundle's graphs should.

    Memory is that of the model in float32.

    Args:
        bundle: The bundle; hashes are not checked.
        attn_implementation: `sdpa` or `eager`.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        BundleError: The weights file lacks a tensor, or cannot be read.
    """
    with torch.device("meta"):
        model = GemmaForCausalLM(bundle.config, attn_implementation=attn_implementation)
    weights = _BundleWeights(bundle.weights_path, bundle.manifest)
    materialized: dict[int, nn.Parameter] = {}  # a tied head is the embedding's parameter itself
    for module_name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.is_folded = True
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in materialized:
                data = torch.empty(parameter.shape, dtype=torch.float32)
                weights.read(f"{module_name}.{name}", data, is_norm=isinstance(module, RMSNorm))
                materialized[id(parameter)] = nn.Parameter(data)
            setattr(module, name, materialized[id(parameter)])
    return model.eval()


def load_cache_scales(bundle: Bundle) -> list[tuple[Tensor, Tensor]]:
    """Read the scales of a bundle's int8 cache, of the model that `load_bundle_model` builds.

    Returns:
        Of each layer what a code of 1 stands for in its keys and values, float32 [K, H] each.

    Raises:
        BundleError: The weights file lacks them, or cannot be read.
    """
    config = bundle.config
    weights = _BundleWeights(bundle.weights_path, bundle.manifest)
    scales = []
    for layer in range(config.num_hidden_layers):
        key, value = (
            weights.read_cache_scale(name, (config.num_key_value_heads, config.head_dim))
            for name in cache_scale_names(layer)
        )
        scales.append((key, value))
    return scales


class _BundleWeights:
    """Reads tensors of a weights file by the checkpoint's names."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._formats = manifest.formats
        self._scaling = manifest.scaling

    def read(self, name: str, into: Tensor, *, is_norm: bool) -> None:
        """Fill a float32 tensor; with 1 + w, if it is a norm's.

        Raises:
            BundleError: The tensor is not there, or of another shape.
        """
        self._read(name.removesuffix(".weight") + ".scale" if is_norm else name, into)
        if self._scaling is not None:
            of = self._scaling.norm_divisor if is_norm else self._scaling.weight_divisor
            into *= of(name)

    def read_cache_scale(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Return the scale of a cache, float32.

        Raises:
            BundleError: It is not there, or of another shape.
        """
        scale = torch.empty(shape)
        self._read(name, scale)
        return scale if self._scaling is None else scale * self._scaling.cache_divisor(name)

    def _read(self, stored: str, into: Tensor) -> None:
        try:
            self._read_blocks(stored, into)
        except (SafetensorError, OSError, RuntimeError) as err:
            raise BundleError(
                f"{stored} cannot be read from {self._path}: {err}. Export the bundle again"
            ) from err

    def _read_blocks(self, stored: str, into: Tensor) -> None:
        weight_format = self._formats.get(stored)
        step = max(1, _BLOCK_BYTES * len(into) // into.nbytes)
        with safe_open(self._path, framework="pt") as file:
            values = file.get_slice(stored)
            scales = None if weight_format is None else file.get_slice(scales_name(stored))
            for start in range(0, len(into), step):
                rows = slice(start, start + step)
                block = values[rows]
                if weight_format is not None and scales is not None:
                    codes = unpack(block, weight_format)
                    block = dequantize(Quantized(codes, scales[rows]), weight_format)
                into[rows].copy_(block)

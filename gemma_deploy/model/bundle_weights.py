"""What a bundle's weights mean, in torch: `load_bundle_model`, `load_cache_scales`, `BundleWeights`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gemma_deploy.bundle import Bundle
from gemma_deploy.errors import BundleError
from gemma_deploy.graph_spec import cache_scale_names
from gemma_deploy.model.attend import AttentionImplementation
from gemma_deploy.model.heads import GemmaForCausalLM
from gemma_deploy.model.norm import RMSNorm
from gemma_deploy.quantization.codes import Quantized, dequantize, unpack
from gemma_deploy.quantization.formats import WeightFormat, scales_name
from gemma_deploy.residual_scaling import ResidualScaling

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
    _weights(bundle).fill(model)
    return model.eval()


def load_cache_scales(bundle: Bundle) -> list[tuple[Tensor, Tensor]]:
    """Read the scales of a bundle's int8 cache, of the model that `load_bundle_model` builds.

    Returns:
        Of each layer what a code of 1 stands for in its keys and values, float32 [K, H] each.

    Raises:
        BundleError: The weights file lacks them, or cannot be read.
    """
    config = bundle.config
    weights = _weights(bundle)
    scales = []
    for layer in range(config.num_hidden_layers):
        key, value = (
            weights.read_cache_scale(name, (config.num_key_value_heads, config.head_dim))
            for name in cache_scale_names(layer)
        )
        scales.append((key, value))
    return scales


class BundleWeights:
    """Reads a weights file by the checkpoint's names: codes times scales, nothing divided, float32.

    Args:
        path: The file.
        formats: How quantized matrices are stored, by name.
        scaling: What is stored divided; None for nothing.
    """

    def __init__(
        self, path: Path, formats: Mapping[str, WeightFormat], scaling: ResidualScaling | None
    ) -> None:
        self._path = path
        self._formats = formats
        self._scaling = scaling

    def fill(self, model: nn.Module, prefix: str = "") -> None:
        """Give a model that was built on `meta` memory, and fill it; its norms become folded.

        Args:
            model: Its parameter names, behind `prefix`, are the checkpoint's canonical names;
                parameters that are one object stay one.
            prefix: What the checkpoint's names have in front, its last dot included.

        Raises:
            BundleError: A tensor is not there, or of another shape.
        """
        # A tied head is the embedding's parameter itself.
        materialized: dict[int, nn.Parameter] = {}
        for module_name, module in model.named_modules():
            is_norm = isinstance(module, RMSNorm)
            if isinstance(module, RMSNorm):
                module.is_folded = True
            path = f"{prefix}{module_name}." if module_name else prefix
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in materialized:
                    data = torch.empty(parameter.shape, dtype=torch.float32)
                    self._read(f"{path}{name}", data, is_norm=is_norm)
                    materialized[id(parameter)] = nn.Parameter(data)
                setattr(module, name, materialized[id(parameter)])

    def rows(self, name: str, parts: Sequence[slice]) -> Tensor:
        """Return some rows of a matrix or of a table, float32 [sum of the parts, D].

        Raises:
            BundleError: It is not there.
        """
        with self._open(name) as read:
            found = torch.cat([read(part) for part in parts]).float()
        return found if self._scaling is None else found * self._scaling.weight_divisor(name)

    def read_cache_scale(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Return the scale of a cache, float32.

        Raises:
            BundleError: It is not there, or of another shape.
        """
        scale = torch.empty(shape)
        self._read_into(name, scale)
        return scale if self._scaling is None else scale * self._scaling.cache_divisor(name)

    def _read(self, name: str, into: Tensor, *, is_norm: bool) -> None:
        """Fill a float32 tensor; with 1 + w, if it is a norm's."""
        self._read_into(name.removesuffix(".weight") + ".scale" if is_norm else name, into)
        if self._scaling is not None:
            of = self._scaling.norm_divisor if is_norm else self._scaling.weight_divisor
            into *= of(name)

    def _read_into(self, stored: str, into: Tensor) -> None:
        step = max(1, _BLOCK_BYTES * len(into) // into.nbytes)
        with self._open(stored) as read:
            for start in range(0, len(into), step):
                rows = slice(start, start + step)
                into[rows].copy_(read(rows))

    @contextmanager
    def _open(self, stored: str) -> Iterator[Callable[[slice], Tensor]]:
        """Give what reads rows of a tensor, dequantized and as they are stored otherwise."""
        weight_format = self._formats.get(stored)
        try:
            with safe_open(self._path, framework="pt") as file:
                values = file.get_slice(stored)
                scales = None if weight_format is None else file.get_slice(scales_name(stored))

                def read(rows: slice) -> Tensor:
                    block: Tensor = values[rows]
                    if weight_format is None or scales is None:
                        return block
                    codes = unpack(block, weight_format)
                    return dequantize(Quantized(codes, scales[rows]), weight_format)

                yield read
        except (SafetensorError, OSError, RuntimeError) as err:
            raise BundleError(
                f"{stored} cannot be read from {self._path}: {err}. Export the bundle again"
            ) from err


def _weights(bundle: Bundle) -> BundleWeights:
    return BundleWeights(bundle.weights_path, bundle.manifest.formats, bundle.manifest.scaling)

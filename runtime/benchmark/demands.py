"""What a model asks of the machine per step and token: `Demands`."""

import math
from dataclasses import dataclass
from typing import Final

from gemma_deploy.checkpoint import expected_tensors
from gemma_deploy.config import SLIDING_ATTENTION, GemmaConfig
from gemma_deploy.graph_spec import DTYPE_BYTES, CacheDType, DType, Lowering, cache_bytes
from gemma_deploy.memory import group_of
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.runtime.source import ModelSource

# Of each block ONNX Runtime's kernels read the scale, which they keep in float32, and the sum of its
# codes: 4.5 bits a weight in blocks of 128, 6 in blocks of 32. Measured with 1.31.
_PACKED_BLOCK_BYTES: Final = 8
_ROW_BLOCK: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Demands:
    """What a step reads, and what a token costs.

    Attributes:
        weights_bytes_per_step: Bytes of weights that a decode step reads: those it multiplies with,
            as they lie in memory.
        cache_bytes_per_token: Bytes of KV cache per row and cached token, of layers that see all.
        window_bytes_per_token: The same of sliding layers.
        window_tokens: Cached tokens that sliding layers see at most; 0 without such layers.
        flop_per_token: Operations of a prompt's token: two per weight of the layers. The head is
            left out, which a prompt needs once, and attention's own products.
        weight_format: What most of the layers' weights are stored in.
    """

    weights_bytes_per_step: int
    cache_bytes_per_token: int
    window_bytes_per_token: int
    window_tokens: int
    flop_per_token: int
    weight_format: WeightFormat


def demands_of(source: ModelSource, backend: str, device: str) -> Demands:
    """Return what a model asks for.

    Args:
        source: The model.
        backend: What runs it: a name from `BACKENDS`.
        device: `cpu` or `cuda`.
    """
    config = source.config
    formats, dense, cache_dtype = _precision(source, backend)
    is_packed = (backend, device) == ("onnxruntime", "cpu")
    weights_bytes = flop = 0
    layers: dict[WeightFormat, int] = {}
    for name, shape in expected_tensors(config).items():
        is_looked_up = group_of(name) == "embedding" and not config.tie_word_embeddings
        if len(shape) != 2 or is_looked_up:
            continue
        weight_format = formats.get(name, WeightFormat(dense))
        weights_bytes += _bytes_read(weight_format, shape, is_packed=is_packed)
        if group_of(name) in ("attention", "feed-forward"):
            flop += 2 * math.prod(shape)
            layers[weight_format] = layers.get(weight_format, 0) + math.prod(shape)
    sliding = config.layer_types.count(SLIDING_ATTENTION)
    per_layer = cache_bytes(config, cache_dtype, 1, 1) // config.num_hidden_layers
    return Demands(
        weights_bytes_per_step=weights_bytes,
        cache_bytes_per_token=per_layer * (config.num_hidden_layers - sliding),
        window_bytes_per_token=per_layer * sliding,
        window_tokens=_window(config) if sliding else 0,
        flop_per_token=flop,
        weight_format=max(layers, key=lambda x: layers[x]),
    )


def _precision(
    source: ModelSource, backend: str
) -> tuple[dict[str, WeightFormat], DType, CacheDType]:
    """Return how matrices are quantized, what the others are stored in, and the cache's dtype."""
    if source.bundle is not None:
        manifest = source.bundle.manifest
        lowering: Lowering = "tensorrt" if backend.startswith("tensorrt") else "onnxruntime"
        precision = manifest.precision_of(lowering)
        return dict(manifest.formats), precision.weights, precision.cache
    if source.engine is not None:
        # What its weights were quantized to is inside the plan; its cache is of the dense dtype.
        dtype = source.engine.manifest.cache_dtype
        return {}, dtype, dtype
    own: DType = next((dtype for dtype in DTYPE_BYTES if dtype == source.config.dtype), "float32")
    return {}, own, own


def _bytes_read(weight_format: WeightFormat, shape: tuple[int, ...], *, is_packed: bool) -> int:
    """Return what a product with a matrix reads: as stored, or as ONNX Runtime packs it for a CPU."""
    if not is_packed or weight_format.scheme == "nf4":
        return weight_format.size_bytes(shape)
    if weight_format.scheme not in ("int4", "int8"):
        return math.prod(shape) * DTYPE_BYTES["float32"]
    num_blocks = math.prod(shape) // (weight_format.block_size or _ROW_BLOCK)
    return math.prod(shape) * weight_format.bits // 8 + num_blocks * _PACKED_BLOCK_BYTES


def _window(config: GemmaConfig) -> int:
    return config.sliding_window or config.max_position_embeddings

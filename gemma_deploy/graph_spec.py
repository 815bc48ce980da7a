"""The inputs and outputs of the exported graphs: names, order, dims, dtypes, stated here only.

The exporter writes graphs from it, the engine builder derives optimization profiles from it, and the
runtime binds and checks against it.

Dims are letters (symbolic) or numbers: B batch, S tokens this step, L positions whose logits are
asked for, T cache capacity; K, H and V are numbers of the model.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from gemma_deploy.config import GemmaConfig

Phase = Literal["prefill", "decode"]
Lowering = Literal["onnxruntime", "tensorrt", "portable"]
DType = Literal["float32", "float16", "bfloat16"]
CacheDType = DType | Literal["int8"]
"""int8: each channel of a key or value is divided by a scale of its own, and rounded."""
Dim = int | str

PHASES: tuple[Phase, ...] = get_args(Phase)
LOWERINGS: tuple[Lowering, ...] = get_args(Lowering)
DTYPE_BYTES: dict[DType, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
CACHE_DTYPE_BYTES: dict[CacheDType, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

INPUT_IDS = "input_ids"
INPUT_POS = "input_pos"
LOGITS_INDEX = "logits_index"
LOGITS = "logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One graph input or output.

    Attributes:
        name: Its name in the graph.
        dtype: numpy's name of the element type (`bfloat16` too), e.g. `int64`.
        dims: One entry per axis: a number, or the letter of a symbolic dimension.
    """

    name: str
    dtype: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """Everything that crosses a graph's border, in order.

    Attributes:
        phase: `prefill` (any number of tokens) or `decode` (one token per row).
        inputs: Token inputs, then key and value cache of every layer in turn.
        outputs: Logits, then the updated caches in the same order. Each `present.*` is meant to be
            bound to the memory of its `past_key_values.*`.
    """

    phase: Phase
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def cache_inputs(self) -> tuple[TensorSpec, ...]:
        """The `past_key_values.*` inputs, key then value of each layer."""
        return tuple(spec for spec in self.inputs if spec.name.startswith("past_key_values."))

    @property
    def cache_outputs(self) -> tuple[TensorSpec, ...]:
        """The `present.*` outputs, in the order of `cache_inputs`."""
        return tuple(spec for spec in self.outputs if spec.name.startswith("present."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The dtypes of a bundle.

    Attributes:
        weights: What the matrices are stored in that are not quantized.
        activations: What the graphs compute in (norms and logits are always float32).
        cache: What the KV cache holds.
    """

    weights: DType
    activations: DType
    cache: CacheDType

    @classmethod
    def of(cls, dtype: DType, cache: CacheDType | None = None) -> "Precision":
        """Return the precision that `export --dtype` means.

        ONNX Runtime has no bfloat16 matrix product on a CPU, so a bfloat16 bundle keeps its weights
        in bfloat16 and computes in float32.

        Args:
            dtype: What the weights are stored in.
            cache: What the KV cache holds; None for what the graphs compute in.
        """
        compute: DType = "float32" if dtype == "bfloat16" else dtype
        return cls(weights=dtype, activations=compute, cache=cache or compute)

    @classmethod
    def of_quantized(cls, dtype: DType | None, cache: CacheDType | None = None) -> "Precision":
        """Return the precision that `export --dtype` means for a bundle with quantized weights.

        Args:
            dtype: What graphs compute in. None for float32, in which a CPU is fastest, and float16
                on TensorRT.
            cache: What the KV cache holds; None for what the graphs compute in.
        """
        if dtype is not None:
            return cls.of(dtype, cache)
        return cls(weights="float16", activations="float32", cache=cache or "float32")

    def of_lowering(self, lowering: Lowering) -> "Precision":
        """Return what the graphs of a lowering compute in and cache, over the same weights.

        TensorRT computes and caches in the dense weights' dtype; every other graph as the bundle
        says, but that only ONNX Runtime's own attention reads an int8 cache: portable graphs then
        cache in what they compute in.
        """
        if lowering == "tensorrt":
            return Precision(weights=self.weights, activations=self.weights, cache=self.weights)
        if lowering == "portable" and self.cache == "int8":
            return dataclasses.replace(self, cache=self.activations)
        return self


def graph_name(phase: Phase, lowering: Lowering = "onnxruntime") -> str:
    """Return what a graph is called in a bundle: its manifest key, and its file's stem."""
    return phase if lowering == "onnxruntime" else f"{phase}.{lowering}"


def cache_names(layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return ((past key, present key), (past value, present value)) of a layer."""
    key, value = (
        (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}") for part in ("key", "value")
    )
    return key, value


def cache_scale_names(layer: int) -> tuple[str, str]:
    """Return what the scales of a layer's int8 key and value cache are called in the weights file.

    Each is float32 [K, H]: what a code of 1 stands for in that channel.
    """
    prefix = f"model.layers.{layer}.self_attn"
    return f"{prefix}.key_cache_scale", f"{prefix}.value_cache_scale"


def graph_spec(config: GemmaConfig, phase: Phase, cache_dtype: CacheDType) -> GraphSpec:
    """Return what the graph of a phase takes and gives.

    Args:
        config: The model.
        phase: `prefill`: S and L are symbolic, `logits_index` [B, L] picks the positions whose
            logits are wanted. `decode`: S = L = 1, no `logits_index`.
        cache_dtype: Element type of the KV cache.

    Returns:
        `input_ids` int64 [B, S], `input_pos` int64 [B] (tokens already cached, per row),
        `past_key_values.{i}.key|value` [B, K, T, H]; `logits` float32 [B, L, V] and
        `present.{i}.key|value` like the inputs.
    """
    is_prefill = phase == "prefill"
    tokens: Dim = "S" if is_prefill else 1
    positions: Dim = "L" if is_prefill else 1
    inputs = [
        TensorSpec(name=INPUT_IDS, dtype="int64", dims=("B", tokens)),
        TensorSpec(name=INPUT_POS, dtype="int64", dims=("B",)),
    ]
    if is_prefill:
        inputs.append(TensorSpec(name=LOGITS_INDEX, dtype="int64", dims=("B", positions)))
    outputs = [
        TensorSpec(name=LOGITS, dtype="float32", dims=("B", positions, config.vocab_size)),
    ]
    cache_dims: tuple[Dim, ...] = ("B", config.num_key_value_heads, "T", config.head_dim)
    for layer in range(config.num_hidden_layers):
        for past, present in cache_names(layer):
            inputs.append(TensorSpec(name=past, dtype=cache_dtype, dims=cache_dims))
            outputs.append(TensorSpec(name=present, dtype=cache_dtype, dims=cache_dims))
    return GraphSpec(phase=phase, inputs=tuple(inputs), outputs=tuple(outputs))


def cache_bytes(config: GemmaConfig, dtype: CacheDType, batch_size: int, max_seq_len: int) -> int:
    """Return the size of a KV cache for `batch_size` rows of `max_seq_len` tokens, in bytes."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * CACHE_DTYPE_BYTES[dtype] * batch_size * max_seq_len

"""Size estimates: what a model's weights, KV cache and activations take, from its numbers alone.

Nothing is measured here. Weights and cache are exact (they are stored and allocated in these very
shapes); activations are the largest set of tensors that is alive at once in a layer, or at the head.
A GPU holds the weights as stored; what a CPU holds, and what loading takes, is `cpu_memory`'s.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from gemma_deploy.checkpoint import expected_tensors
from gemma_deploy.config import GemmaConfig
from gemma_deploy.cpu_memory import CpuMemory, PackedMatrix, cpu_memory
from gemma_deploy.graph_spec import DTYPE_BYTES, DType, Precision, cache_bytes
from gemma_deploy.quantization.formats import WeightFormat

GROUPS: Final = ("embedding", "attention", "feed-forward", "norms", "head")

_FLOAT32_BYTES: Final = DTYPE_BYTES["float32"]
_DENSE: Final[Mapping[str, WeightFormat]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What running a model takes, in bytes.

    Attributes:
        batch_size: B, rows.
        max_seq_len: T, capacity of the KV cache in tokens.
        prefill_tokens: S, most tokens of one row that are computed in one step.
        weights_bytes: The weights as they are stored, and as a GPU holds them.
        kv_cache_bytes: Key and value cache of every layer.
        activation_bytes: Peak of the tensors inside a prefill step; a decode step needs less.
        cpu: What a CPU takes besides the last two.
    """

    batch_size: int
    max_seq_len: int
    prefill_tokens: int
    weights_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    cpu: CpuMemory

    @property
    def gpu_total_bytes(self) -> int:
        """Weights, KV cache and activations together, on a GPU."""
        return self.weights_bytes + self.kv_cache_bytes + self.activation_bytes

    @property
    def cpu_total_bytes(self) -> int:
        """What a process that runs it on a CPU keeps of private memory."""
        return self._on_cpu(self.cpu.weights_bytes)

    @property
    def cpu_peak_bytes(self) -> int:
        """The most that it takes: while it loads, or in a step."""
        return max(self.cpu.loading_bytes, self.cpu_total_bytes)

    @property
    def prepacked_total_bytes(self) -> int:
        """As `cpu_total_bytes`, with a prepacked cache that has the model."""
        return self._on_cpu(self.cpu.prepacked_weights_bytes)

    @property
    def prepacked_peak_bytes(self) -> int:
        """As `cpu_peak_bytes`, with such a cache."""
        return max(self.cpu.prepacked_loading_bytes, self.prepacked_total_bytes)

    @property
    def prepacked_writing_bytes(self) -> int:
        """The most that the load takes which writes that cache."""
        return max(self.cpu.prepacked_writing_bytes, self.prepacked_total_bytes)

    def to_dict(self) -> dict[str, int]:
        """Return every figure under its name, totals included."""
        figures = dataclasses.asdict(self)
        cpu = figures.pop("cpu")
        return {
            **figures,
            "gpu_total_bytes": self.gpu_total_bytes,
            "runtime_bytes": cpu["runtime_bytes"],
            "tokenizer_bytes": cpu["tokenizer_bytes"],
            "cpu_weights_bytes": cpu["weights_bytes"],
            "cpu_total_bytes": self.cpu_total_bytes,
            "cpu_peak_bytes": self.cpu_peak_bytes,
            "prepacked_weights_bytes": cpu["prepacked_weights_bytes"],
            "prepacked_total_bytes": self.prepacked_total_bytes,
            "prepacked_peak_bytes": self.prepacked_peak_bytes,
            "prepacked_writing_bytes": self.prepacked_writing_bytes,
        }

    def _on_cpu(self, weights_bytes: int) -> int:
        held = self.cpu.runtime_bytes + self.cpu.tokenizer_bytes + weights_bytes
        return held + self.kv_cache_bytes + self.activation_bytes


def num_parameters(config: GemmaConfig) -> int:
    """Return the number of weights of a model; a tied embedding counts once."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def weights_bytes(config: GemmaConfig, precision: Precision) -> int:
    """Return the size of a bundle's weights in bytes: matrices as asked for, norms in float32."""
    total = 0
    for name, shape in expected_tensors(config).items():
        matrix_or_bias = precision.weights if len(shape) == 2 else precision.activations
        dtype = "float32" if group_of(name) == "norms" else matrix_or_bias
        total += math.prod(shape) * DTYPE_BYTES[dtype]
    return total


def packed_matrices(
    config: GemmaConfig, dtype: DType, formats: Mapping[str, WeightFormat] = _DENSE
) -> Iterator[PackedMatrix]:
    """Yield every matrix that a model multiplies with.

    Not an embedding that is not also the head: its rows are looked up in the mapped file.

    Args:
        config: The model.
        dtype: What matrices are stored in that are not quantized.
        formats: How the others are quantized, by name.
    """
    for name, shape in expected_tensors(config).items():
        is_looked_up = group_of(name) == "embedding" and not config.tie_word_embeddings
        if len(shape) == 2 and not is_looked_up:
            yield PackedMatrix.of(shape, dtype, formats.get(name))


def group_of(tensor_name: str) -> str:
    """Return which of `GROUPS` a weight belongs to, by its canonical name."""
    if "norm" in tensor_name:  # before attention: q_norm and k_norm live there
        return "norms"
    if ".self_attn." in tensor_name:
        return "attention"
    if ".mlp." in tensor_name:
        return "feed-forward"
    return "head" if tensor_name.startswith("lm_head.") else "embedding"


def sums_by_group(tensors: Iterable[tuple[str, int]]) -> Mapping[str, int]:
    """Sum (name, number) pairs per group; groups without tensors are left out."""
    sums = dict.fromkeys(GROUPS, 0)
    for name, number in tensors:
        sums[group_of(name)] += number
    return {group: total for group, total in sums.items() if total}


def activation_bytes(
    config: GemmaConfig, dtype: DType, *, batch_size: int, tokens: int, max_seq_len: int
) -> int:
    """Return the peak of a step's intermediate tensors in bytes.

    The largest of three places, each with the residual stream [B, S, D] alive:

    * attention: its input [B, S, D], q and its output [B, S, N*H], k and v [B, S, K*H], and the
      float32 scores [B, N, S, T];
    * feed-forward: its input [B, S, D] and gate, gelu(gate) and up, [B, S, F] each;
    * head: the float32 logits [B, 1, V] of the one position per row that a prompt asks for.

    Args:
        config: The model.
        dtype: What the graph computes in.
        batch_size: B.
        tokens: S, tokens of each row in this step.
        max_seq_len: T, the longest row that the step's tokens attend to.
    """
    rows = batch_size * tokens
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    itemsize = DTYPE_BYTES[dtype]
    residual = rows * config.hidden_size * itemsize
    scores = rows * config.num_attention_heads * max_seq_len * _FLOAT32_BYTES
    attention = rows * (config.hidden_size + 2 * q_width + 2 * kv_width) * itemsize + scores
    feed_forward = rows * (config.hidden_size + 3 * config.intermediate_size) * itemsize
    head = batch_size * config.vocab_size * _FLOAT32_BYTES
    return residual + max(attention, feed_forward, head)


def estimate(  # noqa: PLR0913  # a keyword for each number
    config: GemmaConfig,
    precision: Precision,
    formats: Mapping[str, WeightFormat] = _DENSE,
    *,
    stored_bytes: int,
    tokenizer_file_bytes: int,
    batch_size: int,
    max_seq_len: int,
    prefill_tokens: int,
) -> MemoryEstimate:
    """Estimate what running a model takes.

    Args:
        config: The model.
        precision: Dtypes of activations and cache.
        formats: How matrices are quantized, by name.
        stored_bytes: The weights' size as stored.
        tokenizer_file_bytes: Size of tokenizer.json; 0 without one.
        batch_size: B, prompts at a time.
        max_seq_len: T, tokens of prompt and answer together.
        prefill_tokens: S, longest piece of a prompt that is computed at once.
    """
    tokens = min(prefill_tokens, max_seq_len)
    return MemoryEstimate(
        batch_size=batch_size,
        max_seq_len=max_seq_len,
        prefill_tokens=tokens,
        weights_bytes=stored_bytes,
        cpu=cpu_memory(
            packed_matrices(config, precision.weights, formats),
            vocab_size=config.vocab_size,
            tokenizer_file_bytes=tokenizer_file_bytes,
        ),
        kv_cache_bytes=cache_bytes(config, precision.cache, batch_size, max_seq_len),
        activation_bytes=activation_bytes(
            config,
            precision.activations,
            batch_size=batch_size,
            tokens=tokens,
            max_seq_len=max_seq_len,
        )
        + _widened_bytes(config, precision, batch_size, max_seq_len),
    )


def _widened_bytes(
    config: GemmaConfig, precision: Precision, batch_size: int, max_seq_len: int
) -> int:
    """Return what a prompt widens of an int8 cache: one layer's at a time, and attention's copy of it."""
    if precision.cache != "int8":
        return 0
    layer = cache_bytes(config, "float32", batch_size, max_seq_len) // config.num_hidden_layers
    return 2 * layer

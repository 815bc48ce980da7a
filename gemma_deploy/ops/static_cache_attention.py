"""The torch op `gemma_deploy::static_cache_attention`: attention that owns its KV cache update.

One node of an exported graph holds everything about attention that targets express differently:
rotary embedding, the write into the cache, the causal mask of ragged rows, sliding window, softcap.
Its inputs, outputs and attributes are stated here only; lowerings import them.
"""

from dataclasses import MISSING, dataclass, fields
from typing import Final

import torch
from torch import Tensor

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.model.rotary import apply_rotary
from gemma_deploy.ops.attention_kernels import are_supported, attend_on_gpu

OP_NAME: Final = "gemma_deploy::static_cache_attention"
INPUTS: Final = (
    "query",
    "key",
    "value",
    "key_cache",
    "value_cache",
    "cos",
    "sin",
    "input_pos",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticCacheAttentionAttributes:
    """Attributes of the op, in schema order.

    Attributes:
        scale: Factor on attention scores.
        softcap: c in `c * tanh(score / c)`, applied before the mask; 0 for none.
        sliding_window: Keys a query sees, its own included, in tokens; 0 for all.
    """

    scale: float
    softcap: float = 0.0
    sliding_window: int = 0

    @classmethod
    def of_layer(cls, config: GemmaConfig, layer_idx: int) -> "StaticCacheAttentionAttributes":
        """Return the attributes of one layer of a model."""
        return cls(
            scale=config.attention_scale,
            softcap=config.attn_logit_softcapping or 0.0,
            sliding_window=config.window_of(layer_idx) or 0,
        )


def _schema() -> str:
    """Return the op's schema, written from `INPUTS` and the attributes' dataclass."""
    schema_types = {float: "float", int: "int"}
    attributes = []
    for field in fields(StaticCacheAttentionAttributes):
        default = "" if field.default is MISSING else f"={field.default}"
        attributes.append(f"{schema_types[field.type]} {field.name}{default}")  # type: ignore[index]  # no string annotations here
    inputs = ", ".join(f"Tensor {name}" for name in INPUTS)
    return f"({inputs}, *, {', '.join(attributes)}) -> (Tensor, Tensor, Tensor)"


def _static_cache_attention(  # noqa: PLR0913, PLR0917  # the op's tensors; graph nodes have no structs
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    input_pos: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sliding_window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    capacity = key_cache.shape[2]
    positions = input_pos[:, None] + torch.arange(query.shape[1], device=query.device)  # [B, S]
    length = _checked_length(positions, capacity)
    key_cache = _written(key_cache, apply_rotary(key, cos, sin), positions)
    value_cache = _written(value_cache, value, positions)
    output = _attend(
        apply_rotary(query, cos, sin),
        key_cache[:, :, :length],
        value_cache[:, :, :length],
        positions,
        StaticCacheAttentionAttributes(scale=scale, softcap=softcap, sliding_window=sliding_window),
    )
    return output, key_cache, value_cache


def _checked_length(positions: Tensor, capacity: int) -> int:
    """Return how many cache slots are in use after this step."""
    if not positions.numel():
        return 0
    first, last = int(positions.min()), int(positions.max())
    if first < 0 or last >= capacity:
        raise RequestError(
            f"input_pos asks for cache slots {first} to {last}; the cache has {capacity}, counted "
            "from 0. Use a larger cache or fewer tokens"
        )
    return last + 1


def _written(cache: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Return a copy of a cache [B, K, T, H] with rows [B, S, K, H] at positions [B, S]."""
    cache = cache.clone()
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None]
    cache[batch, :, positions] = rows.to(cache.dtype)
    return cache


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    attributes: StaticCacheAttentionAttributes,
) -> Tensor:
    """Attend from [B, S, N, H] to [B, K, T, H]; scores in float32 (float64 for float64)."""
    batch, num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, length = key.shape[1], key.shape[2]
    compute = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(compute).transpose(1, 2)  # [B, N, S, H]
    grouped = grouped.reshape(batch, num_kv_heads, -1, num_tokens, head_dim)  # [B, K, N/K, S, H]
    scores = grouped @ key.to(compute)[:, :, None].transpose(-1, -2) * attributes.scale
    if attributes.softcap:
        scores = attributes.softcap * torch.tanh(scores / attributes.softcap)
    slots = torch.arange(length, device=query.device)
    distance = positions[:, :, None] - slots  # [B, S, T]
    is_visible = distance >= 0
    if attributes.sliding_window:
        is_visible &= distance < attributes.sliding_window
    scores = scores.masked_fill(~is_visible[:, None, None], -torch.inf)
    output = torch.softmax(scores, dim=-1) @ value.to(compute)[:, :, None]
    output = output.reshape(batch, num_heads, num_tokens, head_dim)
    return output.transpose(1, 2).to(query.dtype).contiguous()


static_cache_attention = torch.library.custom_op(
    OP_NAME, _static_cache_attention, mutates_args=(), schema=_schema()
)
"""`static_cache_attention(query, key, value, key_cache, value_cache, cos, sin, input_pos, *, scale,
softcap=0.0, sliding_window=0) -> (output, key_cache, value_cache)`.

Rotates query and key, writes S rows per batch row into copies of the caches at `input_pos[b]`, and
attends: query i of row b sees cache slots j <= input_pos[b] + i, and with a window only
j > input_pos[b] + i - sliding_window. Importing this module registers it as
`torch.ops.gemma_deploy.static_cache_attention`. Nothing is changed in place: the caches returned
are new tensors (a graph binds them to the memory of its inputs). On a GPU, float16 and bfloat16 run
the kernels of `gemma_deploy.plugins.attention`, where Triton is installed.

Args:
    query: [B, S, N, H], not rotated.
    key: [B, S, K, H], not rotated; K divides N.
    value: [B, S, K, H].
    key_cache: [B, K, T, H], of any floating dtype; rows are cast when written.
    value_cache: [B, K, T, H].
    cos: [B, S, H/2] in the query's dtype.
    sin: [B, S, H/2] in the query's dtype.
    input_pos: int64 [B], each row's number of cached tokens.
    scale, softcap, sliding_window: See `StaticCacheAttentionAttributes`.

Raises:
    RequestError: If rows would be written past the caches' capacity (eager execution only, and not
        while a CUDA graph is captured, when nothing may be read back).
"""


@static_cache_attention.register_kernel("cuda")
def _static_cache_attention_on_gpu(
    *inputs: Tensor, **attributes: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, key_cache, value_cache, cos, sin, input_pos = inputs
    if not are_supported(query, key_cache):
        return _static_cache_attention(*inputs, **attributes)  # type: ignore[arg-type]  # as the schema says
    values = StaticCacheAttentionAttributes(**attributes)  # type: ignore[arg-type]  # as the schema says
    positions = input_pos[:, None] + torch.arange(query.shape[1], device=query.device)  # [B, S]
    if not torch.cuda.is_current_stream_capturing():
        _checked_length(positions, key_cache.shape[2])
    key_cache = _written(key_cache, apply_rotary(key, cos, sin), positions)
    value_cache = _written(value_cache, value, positions)
    output = attend_on_gpu(
        apply_rotary(query, cos, sin),
        key_cache,
        value_cache,
        input_pos,
        values.scale,
        values.softcap,
        values.sliding_window,
    )
    return output, key_cache, value_cache


@static_cache_attention.register_fake
def _(*inputs: Tensor, **_attributes: float) -> tuple[Tensor, Tensor, Tensor]:
    query, key_cache, value_cache = (
        inputs[INPUTS.index(name)] for name in ("query", "key_cache", "value_cache")
    )
    # The output is contiguous; the caches keep the strides of those given, as clone() does.
    output = query.new_empty(query.shape)
    return output, torch.empty_like(key_cache), torch.empty_like(value_cache)

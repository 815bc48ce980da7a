"""Attention of the eager model: rotary embedding, KV cache, mask, softmax: `CachedAttention`."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma_deploy.config import LayerType
from gemma_deploy.model.attention import GemmaAttention
from gemma_deploy.model.kv_cache import KVCache, Step
from gemma_deploy.model.masks import StepMasks
from gemma_deploy.model.rotary import RotaryEmbedding, apply_rotary

AttentionImplementation = Literal["eager", "sdpa"]


class CachedAttention:
    """An `Attend` for one forward pass of the eager model.

    Args:
        rotary: The model's rotary embedding.
        position_ids: int64 [B or 1, S].
        step: Where the tokens lie in the cache.
        masks: The step's masks.
        cache: Where keys and values are kept; None when only this step's are attended to.
        implementation: `eager` computes and returns attention weights; `sdpa` is torch's
            scaled_dot_product_attention (flash where it applies), which returns none. It cannot cap
            scores: layers with a softcap run eager all the same.
    """

    def __init__(
        self,
        *,
        rotary: RotaryEmbedding,
        position_ids: Tensor,
        step: Step,
        masks: StepMasks,
        cache: KVCache | None,
        implementation: AttentionImplementation,
    ) -> None:
        self._rotary = rotary
        self._position_ids = position_ids
        self._step = step
        self._masks = masks
        self._cache = cache
        self._implementation = implementation
        self._cos_sin: dict[LayerType, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, layer: GemmaAttention, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see `gemma_deploy.model.attention.Attend`."""
        if layer.layer_type not in self._cos_sin:
            self._cos_sin[layer.layer_type] = self._rotary(self._position_ids, layer.layer_type)
        cos, sin = self._cos_sin[layer.layer_type]
        query = apply_rotary(query, cos, sin).transpose(1, 2)  # [B, N, S, H]
        key = apply_rotary(key, cos, sin).transpose(1, 2)  # [B, K, S, H]
        value = value.transpose(1, 2)
        if self._cache is not None:
            key, value = self._cache.update(layer.layer_idx, key, value, self._step)
            key, value = key.to(query.dtype), value.to(query.dtype)
        weights = None
        if self._implementation == "sdpa" and layer.softcap is None:
            output = sdpa_attention(layer, query, key, value, self._masks)
        else:
            output, weights = eager_attention(layer, query, key, value, self._masks)
        return output.transpose(1, 2), weights  # [B, S, N, H]


def eager_attention(
    layer: GemmaAttention, query: Tensor, key: Tensor, value: Tensor, masks: StepMasks
) -> tuple[Tensor, Tensor]:
    """Attend in plain torch, as transformers' eager attention rounds it.

    Args:
        layer: Gives scale, softcap, window and dropout.
        query: [B, N, S, H], rotated.
        key: [B, K, T, H], rotated.
        value: [B, K, T, H].
        masks: The step's masks.

    Returns:
        The output [B, N, S, H] and the weights [B, N, S, T], in the query's dtype.
    """
    num_groups = layer.num_heads // layer.num_kv_heads
    key, value = key.repeat_interleave(num_groups, 1), value.repeat_interleave(num_groups, 1)
    scores = query @ key.transpose(2, 3) * layer.scale  # [B, N, S, T]
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    if not masks.is_all_visible(layer.sliding_window):
        # The lowest finite number, not -inf: a padding token that sees nothing must not become NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~masks.dense(layer.sliding_window), lowest)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, layer.dropout, training=layer.training)
    return weights @ value, weights


def sdpa_attention(
    layer: GemmaAttention, query: Tensor, key: Tensor, value: Tensor, masks: StepMasks
) -> Tensor:
    """Attend with torch's scaled_dot_product_attention; shapes as in `eager_attention`.

    The mask is left to `is_causal`, or left out, where that says the same: only then does torch
    choose its flash kernels.
    """
    window = layer.sliding_window
    is_causal = masks.is_plain_causal(window) and query.shape[2] > 1
    mask = None if is_causal or masks.is_all_visible(window) else masks.dense(window)
    num_groups = layer.num_heads // layer.num_kv_heads
    # Fused kernels group heads themselves only without a mask; elsewhere torch falls back to a
    # slower path than repeated heads.
    is_grouped_inside = num_groups > 1 and mask is None
    if num_groups > 1 and not is_grouped_inside:
        key, value = key.repeat_interleave(num_groups, 1), value.repeat_interleave(num_groups, 1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=layer.dropout if layer.training else 0.0,
        is_causal=is_causal,
        scale=layer.scale,
        enable_gqa=is_grouped_inside,
    )

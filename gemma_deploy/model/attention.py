"""One layer's attention: `GemmaAttention` projects, a caller's `attend` does the rest.

What happens between the projections (rotary embedding, KV cache, mask, softmax) depends on where the
model runs: in eager torch it is `attend.CachedAttention`, in an exported graph the op
`static_cache_attention`. The layer is the same in both.
"""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from gemma_deploy.config import GemmaConfig
from gemma_deploy.model.norm import RMSNorm


class GemmaAttention(nn.Module):
    """Query, key, value and output projections of one layer, and its attention's numbers.

    Attributes:
        layer_idx: Index of the decoder layer, from 0.
        layer_type: `full_attention` or `sliding_attention`.
        sliding_window: Keys a token sees, itself included; None for all.
        scale: Factor on attention scores.
        softcap: c in `c * tanh(score / c)`; None for no cap.
        dropout: Probability of dropping an attention weight while training.
    """

    def __init__(self, config: GemmaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.sliding_window = config.window_of(layer_idx)
        self.scale = config.attention_scale
        self.softcap = config.attn_logit_softcapping
        self.dropout = config.attention_dropout
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.has_qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.has_qk_norm else None

    def forward(self, hidden: Tensor, attend: "Attend") -> tuple[Tensor, Tensor | None]:
        """Attend from normalized hidden states.

        Args:
            hidden: [B, S, D].
            attend: See `Attend`.

        Returns:
            The layer's output [B, S, D], and the attention weights if `attend` returned them.
        """
        query = self.q_proj(hidden).unflatten(-1, (self.num_heads, self.head_dim))  # [B, S, N, H]
        key = self.k_proj(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))  # [B, S, K, H]
        value = self.v_proj(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        output, weights = attend(self, query, key, value)
        return self.o_proj(output.flatten(-2)), weights


Attend: TypeAlias = Callable[[GemmaAttention, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(layer, query [B, S, N, H], key [B, S, K, H], value [B, S, K, H]), query and key not yet rotated,
-> (output [B, S, N, H], attention weights [B, N, S, T] or None)."""

"""The decoder: `GemmaModel`, one definition of Gemma 1, 2 and 3 driven by `GemmaConfig`.

The loop over layers takes the attention as a callable (`attention.Attend`), so that the eager model
and exported graphs are the same modules run by the same code.
"""

from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.model.attend import AttentionImplementation, CachedAttention
from gemma_deploy.model.attention import Attend, GemmaAttention
from gemma_deploy.model.feed_forward import GemmaFeedForward
from gemma_deploy.model.inputs import (
    check_cache,
    check_companions,
    check_embeddings,
    check_token_ids,
)
from gemma_deploy.model.kv_cache import DynamicCache, KVCache, Step
from gemma_deploy.model.loading import load_model
from gemma_deploy.model.norm import RMSNorm
from gemma_deploy.model.outputs import ModelOutput
from gemma_deploy.model.packed_documents import step_masks
from gemma_deploy.model.rotary import RotaryEmbedding


class GemmaDecoderLayer(nn.Module):
    """Attention and feed-forward, each on a normalized copy of the residual stream.

    Without post-norms (Gemma 1), `post_attention_layernorm` is the feed-forward's input norm; with
    them (Gemma 2, 3) it normalizes the attention's output. The names are the checkpoints'.
    """

    def __init__(self, config: GemmaConfig, layer_idx: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.has_post_norms = config.has_post_norms
        self.self_attn = GemmaAttention(config, layer_idx)
        self.mlp = GemmaFeedForward(config)
        self.input_layernorm = RMSNorm(size, eps)
        self.post_attention_layernorm = RMSNorm(size, eps)
        if config.has_post_norms:
            self.pre_feedforward_layernorm = RMSNorm(size, eps)
            self.post_feedforward_layernorm = RMSNorm(size, eps)

    def forward(
        self, hidden: Tensor, attend: Attend, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map the residual stream [B, S, D] to the next layer's; attention weights if there are.

        With `index`, int64 [B, L], the output is that of these positions, [B, L, D]: the others are
        attended to, and need no feed-forward.
        """
        attended, weights = self.self_attn(self.input_layernorm(hidden), attend)
        if self.has_post_norms:
            hidden = hidden + self.post_attention_layernorm(attended)
            fed = self.mlp(_at_positions(self.pre_feedforward_layernorm(hidden), index))
            hidden = _at_positions(hidden, index)
            return hidden + self.post_feedforward_layernorm(fed), weights
        hidden = hidden + attended
        fed = self.mlp(_at_positions(self.post_attention_layernorm(hidden), index))
        return _at_positions(hidden, index) + fed, weights


class GemmaModel(nn.Module):
    """Embedding, decoder layers, last norm.

    Args:
        config: The model's parameters.
        attn_implementation: `sdpa` or `eager`; see `CachedAttention`.

    Raises:
        RequestError: If there is no such attention implementation.
    """

    def __init__(
        self, config: GemmaConfig, *, attn_implementation: AttentionImplementation = "sdpa"
    ) -> None:
        super().__init__()
        if attn_implementation not in get_args(AttentionImplementation):
            raise RequestError(
                f"attn_implementation is {attn_implementation!r}; expected "
                f"{', '.join(get_args(AttentionImplementation))}"
            )
        self.config = config
        self.attn_implementation = attn_implementation
        pad = config.pad_token_id
        padding_idx = pad if pad is not None and pad < config.vocab_size else None
        # From an empty table: nn.Embedding's own initialization would be thrown away.
        self.embed_tokens = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            torch.empty(config.vocab_size, config.hidden_size),
            freeze=False,
            padding_idx=padding_idx,
        )
        self.layers = nn.ModuleList(
            GemmaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self._embed_scales = {
            # Gemma multiplies by sqrt(D) rounded to the weights' dtype: 55.5 for D 3072 in bfloat16.
            dtype: float(torch.tensor(config.hidden_size**0.5, dtype=dtype, device="cpu"))
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        }
        initialize_weights(self, config)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        attn_implementation: AttentionImplementation = "sdpa",
    ) -> "GemmaModel":
        """Load a checkpoint folder without its head; see `GemmaForCausalLM.from_pretrained`."""
        return load_model(
            partial(cls, attn_implementation=attn_implementation),
            Checkpoint.open(folder),
            dtype=dtype,
            device=device,
            prefix="model.",
        )

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return scaled embeddings [B, S, D] of int64 token ids [B, S]."""
        weight = self.embed_tokens.weight
        embedded: Tensor = self.embed_tokens(input_ids)
        return embedded * self._embed_scales[weight.dtype]

    def divide_embeddings(self, divisor: float) -> None:
        """Let `embed` return scaled embeddings divided by a power of two."""
        self._embed_scales = {dtype: x / divisor for dtype, x in self._embed_scales.items()}

    def decode_layers(
        self,
        hidden: Tensor,
        attend: Attend,
        *,
        index: Tensor | None = None,
        hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        """Run every layer and the last norm.

        Args:
            hidden: Scaled embeddings [B, S, D].
            attend: Attention with its cache; called once for each layer, in order.
            index: Positions whose result is wanted, int64 [B, L]; None for all. Of the last layer's
                feed-forward, the largest part of a layer, only these are computed.
            hidden_states: If given, `hidden`, each layer's output but the last, and the result
                are appended.
            attentions: If given, attention weights are appended where `attend` returns them.

        Returns:
            Normalized hidden states [B, S or L, D].
        """
        for number, layer in enumerate(self.layers, 1):
            if hidden_states is not None:
                hidden_states.append(hidden)
            is_last = number == len(self.layers)
            hidden, weights = layer(hidden, attend, index if is_last else None)
            if attentions is not None and weights is not None:
                attentions.append(weights)
        hidden = self.norm(hidden)
        if hidden_states is not None:
            hidden_states.append(hidden)
        return hidden

    def forward(  # noqa: PLR0913  # transformers' signature, all but input_ids by keyword
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        cache_position: Tensor | None = None,
    ) -> ModelOutput:
        """Run the decoder as transformers' GemmaModel does.

        Args:
            input_ids: int64 [B, S]; this or `inputs_embeds`.
            attention_mask: [B, cached + S], nonzero where there is a token; padding left or right.
                None for no padding.
            position_ids: int64 [B or 1, S], for rotary embedding; by default the cache slots. Where
                they do not go on by 1, another document begins: without a cache and a mask,
                documents do not see each other. Elsewhere positions that go back are refused.
            past_key_values: Cache to read and write, a `DynamicCache` or `StaticCache` of this
                package; its tensors change.
            inputs_embeds: Scaled embeddings [B, S, D].
            use_cache: Whether to start a DynamicCache when no cache is given; by default as the
                config says.
            output_hidden_states: Whether to return every layer's input.
            output_attentions: Whether to return attention weights; runs eager attention.
            cache_position: Cache slots of the new tokens, int64 [S], or [B, S] with a StaticCache;
                by default those behind the cached tokens.

        Raises:
            RequestError: If inputs are of another kind, dtype or shape, contradict each other, or
                on a CPU hold ids outside the vocabulary; PromptTooLongError if a StaticCache is
                too small.
        """
        embeds = self._embeddings(input_ids, inputs_embeds)
        check_companions(
            embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache_position=cache_position,
        )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache: KVCache | None = DynamicCache() if use_cache else None
        if past_key_values is not None:
            cache = check_cache(past_key_values, self.config, embeds.shape[0])
        step = Step.after(
            0 if cache is None else cache.get_seq_length(),
            embeds.shape[1],
            embeds.device,
            cache_position,
        )
        if cache is None and (step.start, step.length) != (0, embeds.shape[1]):
            raise RequestError(
                f"cache_position asks for slots {step.start} to {step.length - 1} and there is no "
                "cache: pass past_key_values, or leave cache_position out"
            )
        attend = CachedAttention(
            rotary=self.rotary_emb,
            position_ids=step.positions if position_ids is None else position_ids,
            step=step,
            masks=step_masks(
                step,
                attention_mask,
                position_ids,
                has_cache=cache is not None,
                is_bidirectional=self.config.use_bidirectional_attention,
            ),
            cache=cache,
            implementation="eager" if output_attentions else self.attn_implementation,
        )
        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        attentions: list[Tensor] | None = [] if output_attentions else None
        hidden = self.decode_layers(
            embeds, attend, hidden_states=hidden_states, attentions=attentions
        )
        return ModelOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            attentions=None if attentions is None else tuple(attentions),
        )

    def _embeddings(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return the scaled embeddings [B, S, D] of whichever is given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give exactly one of input_ids and inputs_embeds")
        weight = self.embed_tokens.weight
        if input_ids is None:
            return check_embeddings(inputs_embeds, weight)
        return self.embed(check_token_ids(input_ids, weight))


def _at_positions(hidden: Tensor, index: Tensor | None) -> Tensor:
    """Return rows of [B, S, D] at positions int64 [B, L], as [B, L, D]; all of them if None."""
    if index is None:
        return hidden
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


@torch.no_grad()
def initialize_weights(module: nn.Module, config: GemmaConfig) -> None:
    """Draw fresh weights as transformers does: normal matrices, zero biases, norms and padding.

    Weights on `meta` are left alone: drawing there does nothing, for 70 MB of torch's modules.
    """
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(0.0, config.initializer_range)
        if isinstance(part, nn.Linear) and part.bias is not None:
            part.bias.zero_()
        elif isinstance(part, nn.Embedding) and part.padding_idx is not None:
            part.weight[part.padding_idx].zero_()
        elif isinstance(part, RMSNorm):
            part.weight.zero_()

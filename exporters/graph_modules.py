"""The model as graphs see it: flat tensors in, flat tensors out, a static cache between steps.

`PrefillModule` and `DecodeModule` wrap the one torch model; their arguments and results are, in
order, the inputs and outputs of `gemma_deploy.graph_spec.graph_spec`.
"""

from dataclasses import asdict

import torch
from torch import Tensor, nn

from gemma_deploy.config import GemmaConfig
from gemma_deploy.model import GemmaForCausalLM
from gemma_deploy.model.attention import GemmaAttention
from gemma_deploy.model.norm import RMSNorm
from gemma_deploy.model.rotary import inverse_frequencies
from gemma_deploy.ops.static_cache_attention import (
    StaticCacheAttentionAttributes,
    static_cache_attention,
)
from gemma_deploy.residual_scaling import ResidualScaling


class StaticCacheModule(nn.Module):
    """One step of any number of tokens over a static KV cache.

    Attributes:
        causal_lm: The model.
        frequencies: Radians per position, float32 [H/2], one buffer per layer type: constants of
            the graph, so that it rotates by torch's own angles.
    """

    def __init__(self, causal_lm: GemmaForCausalLM) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.frequencies = nn.ParameterDict(
            {
                layer_type: nn.Parameter(
                    inverse_frequencies(rope, causal_lm.config.head_dim, _device_of(causal_lm)),
                    requires_grad=False,
                )
                for layer_type, rope in causal_lm.config.rope_parameters.items()
            }
        )

    def hidden_states(
        self,
        input_ids: Tensor,
        input_pos: Tensor,
        caches: tuple[Tensor, ...],
        index: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run every layer.

        Args:
            input_ids: int64 [B, S].
            input_pos: int64 [B], tokens each row has in the cache already.
            caches: Key and value cache [B, K, T, H] of each layer in turn.
            index: Positions that are asked for, int64 [B, L]; None for all.

        Returns:
            Normalized hidden states [B, S or L, D], and the updated caches in the order of `caches`.
        """
        steps = torch.arange(input_ids.shape[1], dtype=torch.int64, device=input_ids.device)
        positions = (input_pos[:, None] + steps).float()[..., None]  # [B, S, 1]
        hidden = self.causal_lm.model.embed(input_ids)
        rotations = {
            layer_type: ((positions * table).cos().to(hidden), (positions * table).sin().to(hidden))
            for layer_type, table in self.frequencies.items()
        }
        updated: list[Tensor] = []

        def attend(
            layer: GemmaAttention, query: Tensor, key: Tensor, value: Tensor
        ) -> tuple[Tensor, None]:
            cos, sin = rotations[layer.layer_type]
            key_cache, value_cache = caches[2 * layer.layer_idx : 2 * layer.layer_idx + 2]
            attributes = StaticCacheAttentionAttributes.of_layer(
                self.causal_lm.config, layer.layer_idx
            )
            output, key_cache, value_cache = static_cache_attention(
                query, key, value, key_cache, value_cache, cos, sin, input_pos, **asdict(attributes)
            )
            updated.extend((key_cache, value_cache))
            return output, None

        return self.causal_lm.model.decode_layers(hidden, attend, index=index), updated


class PrefillModule(StaticCacheModule):
    """Any number of tokens per row, logits where asked: the prefill graph."""

    def forward(
        self, input_ids: Tensor, input_pos: Tensor, logits_index: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        """Return (logits float32 [B, L, V], updated caches...).

        Args:
            input_ids: int64 [B, S]; short rows are padded on the right with any token.
            input_pos: int64 [B], tokens each row has in the cache already.
            logits_index: int64 [B, L], indices into this step's S tokens.
            *caches: Key and value cache [B, K, T, H] of each layer in turn, input_pos + S <= T.
        """
        hidden, updated = self.hidden_states(input_ids, input_pos, caches, logits_index)
        return (self.causal_lm.logits(hidden), *updated)


class DecodeModule(StaticCacheModule):
    """One token per row: the decode graph."""

    def forward(self, input_ids: Tensor, input_pos: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Return (logits float32 [B, 1, V], updated caches...).

        Args:
            input_ids: int64 [B, 1].
            input_pos: int64 [B], tokens each row has in the cache already.
            *caches: Key and value cache [B, K, T, H] of each layer in turn, input_pos < T.
        """
        hidden, updated = self.hidden_states(input_ids, input_pos, caches)
        return (self.causal_lm.logits(hidden), *updated)


def meta_model(
    config: GemmaConfig, dtype: torch.dtype, scaling: ResidualScaling | None = None
) -> GemmaForCausalLM:
    """Build the model on the meta device, as exported graphs hold it: no weights, norms folded.

    Args:
        config: The model.
        dtype: What its matrices multiply in; norms stay float32, their scales folded to 1 + w.
        scaling: What its weights are divided by; None for nothing. Epsilons and the embedding's
            multiplier follow it here.
    """
    with torch.device("meta"):
        model = GemmaForCausalLM(config).to(dtype).eval()
    if scaling is not None:
        model.model.divide_embeddings(scaling.embedding_divisor)
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.is_folded = True
            module.weight = nn.Parameter(module.weight.float(), requires_grad=False)
            if scaling is not None:
                module.eps = scaling.norm_eps(f"{name}.weight")
    return model


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

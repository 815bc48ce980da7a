"""What the models' forward methods return."""

from dataclasses import dataclass

from torch import Tensor

from gemma_deploy.model.kv_cache import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutput:
    """Output of `GemmaModel`.

    Attributes:
        last_hidden_state: [B, S, D], after the last norm.
        past_key_values: The cache, if one was used.
        hidden_states: If asked for: the embeddings, the output of each layer but the last, and
            `last_hidden_state`; [B, S, D] each.
        attentions: If asked for: attention weights of each layer, [B, N, S, T].
    """

    last_hidden_state: Tensor
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalLMOutput:
    """Output of `GemmaForCausalLM`.

    Attributes:
        logits: float32 [B, L, V], softcapped where the config says so.
        loss: Mean cross entropy of the next tokens, float32 scalar, if labels were given.
        past_key_values: The cache, if one was used.
        hidden_states: As in `ModelOutput`.
        attentions: As in `ModelOutput`.
    """

    logits: Tensor
    loss: Tensor | None = None
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

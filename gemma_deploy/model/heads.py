"""The language model head over the decoder: `GemmaForCausalLM`."""

from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.config import GemmaConfig
from gemma_deploy.model.attend import AttentionImplementation
from gemma_deploy.model.inputs import check_kept, check_labels
from gemma_deploy.model.kv_cache import KVCache
from gemma_deploy.model.loading import load_model
from gemma_deploy.model.outputs import CausalLMOutput
from gemma_deploy.model.saving import save_checkpoint
from gemma_deploy.model.transformer import GemmaModel, initialize_weights

IGNORE_INDEX = -100
"""Label of positions that do not count in the loss."""


class ModelInputs(TypedDict, total=False):
    """Keyword arguments handed on to `GemmaModel.forward`, which documents them."""

    attention_mask: Tensor | None
    position_ids: Tensor | None
    past_key_values: KVCache | None
    inputs_embeds: Tensor | None
    use_cache: bool | None
    output_hidden_states: bool
    output_attentions: bool
    cache_position: Tensor | None


class GemmaForCausalLM(nn.Module):
    """A Gemma that predicts the next token.

    Parameters are named as in Hugging Face checkpoints; a tied head is the embedding's parameter
    itself. The model can be built on the device `meta`.

    Args:
        config: The model's parameters.
        attn_implementation: `sdpa` or `eager`; see `CachedAttention`.
    """

    def __init__(
        self, config: GemmaConfig, *, attn_implementation: AttentionImplementation = "sdpa"
    ) -> None:
        super().__init__()
        self.config = config
        self.model = GemmaModel(config, attn_implementation=attn_implementation)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        else:
            initialize_weights(self.lm_head, config)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        attn_implementation: AttentionImplementation = "sdpa",
    ) -> "GemmaForCausalLM":
        """Load a checkpoint folder; the model is in evaluation mode.

        Weights are read straight into the parameters' memory, block by block: there is never a
        second copy of the model.

        Args:
            folder: Hugging Face layout, safetensors only; see `Checkpoint.open`.
            dtype: Of the parameters; by default the dtype the embedding is stored in.
            device: Of the parameters.
            attn_implementation: `sdpa` or `eager`.

        Raises:
            CheckpointError: See `Checkpoint.open`; or it was saved from a class that generates no
                text.
            ConfigError: See `Checkpoint.open`.
        """
        checkpoint = Checkpoint.open(folder)
        checkpoint.require_text_generator()
        return load_model(
            partial(cls, attn_implementation=attn_implementation),
            checkpoint,
            dtype=dtype,
            device=device,
        )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `model.safetensors` and `config.json`, which transformers reads too.

        Each file is written beside its place and renamed: a failure leaves no half file.

        Raises:
            CheckpointError: If the folder cannot be written.
        """
        save_checkpoint(self, self.config, Path(folder))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits, float32 [B, L, V], of normalized hidden states [B, L, D]."""
        logits: Tensor = self.lm_head(hidden).float()
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **model_inputs: Unpack[ModelInputs],
    ) -> CausalLMOutput:
        """Predict next tokens.

        Args:
            input_ids: int64 [B, S]; this or `inputs_embeds`.
            labels: int64 [B, S], the input tokens themselves: the shift is made here. Positions of
                `IGNORE_INDEX` do not count.
            logits_to_keep: Compute logits of the last n positions only (0: of all), or of the
                positions in an int64 index tensor [L].
            **model_inputs: See `GemmaModel.forward`.

        Raises:
            RequestError: If inputs are of another kind, or contradict each other.
        """
        output = self.model(input_ids, **model_inputs)
        hidden = output.last_hidden_state
        logits = self.logits(hidden[:, check_kept(logits_to_keep, hidden.shape[1])])
        return CausalLMOutput(
            logits=logits,
            loss=None if labels is None else next_token_loss(logits, labels),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross entropy of logits [B, S, V] at i for labels [B, S] at i + 1.

    Raises:
        RequestError: If labels are not int64, not one for each position with logits, or on a CPU
            none of the vocabulary.
    """
    targets = check_labels(labels, logits, ignored=IGNORE_INDEX)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )

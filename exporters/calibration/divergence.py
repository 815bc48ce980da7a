"""How far written weights are from the checkpoint they were made of: `measure_divergence`.

Two residual streams walk through the layers over the same tokens: the checkpoint's, and that of the
weights as they are read back from the bundle's file, so that a fault in packing shows like one in
rounding. Both compute in float32.
"""

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import CheckpointError, ExportError
from gemma_deploy.exporters.calibration.kl_sum import KLSum, capped
from gemma_deploy.exporters.calibration.layer_walk import LayerWalk
from gemma_deploy.exporters.calibration.text import held_out_text, token_rows
from gemma_deploy.model.bundle_weights import BundleWeights
from gemma_deploy.model.norm import RMSNorm
from gemma_deploy.model.transformer import GemmaDecoderLayer
from gemma_deploy.quantization.divergence import Divergence
from gemma_deploy.tokenizer import GemmaTokenizer

MEASURED_TOKENS: Final = 512
MIN_MEASURED_TOKENS: Final = 32
# float64 of one block of logits; some six of them live at once.
_LOGITS_BYTES: Final = 16 << 20

OnProgress = Callable[[str, int, int], object]


def measured_rows(
    tokenizer: GemmaTokenizer, text: str | None, config: GemmaConfig
) -> Tensor | None:
    """Return what both models read, int64 [R, S]: if it can be, what no calibration has read.

    None for a text that is too short to say anything.

    Args:
        tokenizer: The model's.
        text: The calibration text, of which the end is read: calibration reads it from the front.
            None for a built-in text that is kept for this.
        config: The model.

    Raises:
        RequestError: The text is empty, or has tokens that the model has no embedding of.
    """
    rows = token_rows(
        tokenizer,
        held_out_text() if text is None else text,
        row_tokens=min(MEASURED_TOKENS, config.max_position_embeddings),
        min_tokens=1,
        max_tokens=MEASURED_TOKENS,
        vocab_size=config.vocab_size,
        is_from_end=True,
    )
    return rows if rows.numel() >= MIN_MEASURED_TOKENS else None


@torch.no_grad()
def measure_divergence(
    checkpoint: Checkpoint,
    weights: BundleWeights,
    token_rows: Tensor,
    on_progress: OnProgress = lambda *_: None,
) -> Divergence:
    """Compare the next-token distributions of a checkpoint and of weights made of it.

    Memory holds one layer's weights, two residual streams and some blocks of logits, whatever the
    number of layers and the vocabulary.

    Args:
        checkpoint: The original.
        weights: What was made of it.
        token_rows: What both read, int64 [R, S].
        on_progress: Called as the work goes on.

    Raises:
        CheckpointError: The checkpoint's weights cannot be read, or its logits are not finite.
        BundleError: The written weights cannot be read.
        ExportError: They give logits that are not finite.
    """
    stage, config = "measuring the distance from the original", checkpoint.config
    num_layers = config.num_hidden_layers
    walk = LayerWalk(checkpoint, token_rows)
    stored = _embedded(weights, token_rows, config)
    for index in range(num_layers):
        on_progress(stage, index, num_layers + 1)
        # One after the other, so that one layer's weights are in memory at a time.
        walk.advance(walk.layer(index))
        walk.advance(_stored_layer(weights, config, index), stored)
    on_progress(stage, num_layers, num_layers + 1)
    own = walk.last_norm()(walk.hidden).flatten(0, 1)
    with torch.device("meta"):
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    weights.fill(norm, "model.norm.")
    found = _compared(checkpoint, weights, own, norm(stored).flatten(0, 1))
    on_progress(stage, num_layers + 1, num_layers + 1)
    return found


def _embedded(weights: BundleWeights, token_rows: Tensor, config: GemmaConfig) -> Tensor:
    """Return the residual stream [R, S, D] before the first layer."""
    tokens, index = torch.unique(token_rows, return_inverse=True)
    table = weights.rows(EMBEDDING_WEIGHT, [slice(x, x + 1) for x in tokens.tolist()])
    hidden: Tensor = table[index] * config.hidden_size**0.5
    return hidden


def _stored_layer(weights: BundleWeights, config: GemmaConfig, index: int) -> GemmaDecoderLayer:
    with torch.device("meta"):
        layer = GemmaDecoderLayer(config, index)
    weights.fill(layer, f"model.layers.{index}.")
    return layer.eval()


def _compared(
    checkpoint: Checkpoint, weights: BundleWeights, own: Tensor, stored: Tensor
) -> Divergence:
    """Compare normalized hidden states [tokens, D] at the head, a block of the vocabulary at a time."""
    name = HEAD_WEIGHT if HEAD_WEIGHT in checkpoint.tensors else EMBEDDING_WEIGHT
    cap, num_tokens = checkpoint.config.final_logit_softcapping, len(own)
    total, likeliest, stored_likeliest = KLSum(num_tokens), _Likeliest(), _Likeliest()
    step = max(1, _LOGITS_BYTES // (num_tokens * torch.float64.itemsize))
    vocab_size = checkpoint.tensors[name].num_rows
    for start in range(0, vocab_size, step):
        stop = min(start + step, vocab_size)
        head = torch.from_numpy(checkpoint.float_rows(name, start, stop))
        logits = capped(own @ head.T, cap)
        stored_logits = capped(stored @ weights.rows(name, [slice(start, stop)]).T, cap)
        total.add(logits, stored_logits)
        likeliest.add(logits, start)
        stored_likeliest.add(stored_logits, start)
    _require_finite(own, stored, total)
    is_same = likeliest.token == stored_likeliest.token
    return Divergence(
        mean_kl_nats=total.mean(), same_top1=float(is_same.double().mean()), num_tokens=num_tokens
    )


class _Likeliest:
    """The likeliest token of each row of logits, the first of equals."""

    def __init__(self) -> None:
        self.token = torch.tensor(0)
        self._logit = torch.tensor(-torch.inf)

    def add(self, logits: Tensor, first_token: int) -> None:
        """Look at logits [tokens, some of V], of which the first is that of `first_token`."""
        logit, index = logits.max(-1)
        self.token = torch.where(logit > self._logit, index + first_token, self.token)
        self._logit = torch.maximum(logit, self._logit)


def _require_finite(own: Tensor, stored: Tensor, total: KLSum) -> None:
    """Refuse a comparison of which one side is no number."""
    if not bool(torch.isfinite(own).all()):
        raise CheckpointError(
            "the checkpoint itself gives logits that are NaN or infinite in float32: its weights are "
            "damaged; download it again"
        )
    if not (bool(torch.isfinite(stored).all()) and math.isfinite(total.mean())):
        raise ExportError(
            "the weights as they were written give logits that are NaN or infinite in float32: the "
            "disk is damaged, or a matrix is beyond its format; keep it in 16 bits with --keep-fp16"
        )

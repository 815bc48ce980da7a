"""A checkpoint run on text, one layer in memory at a time: `LayerWalk`."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT
from gemma_deploy.errors import CheckpointError
from gemma_deploy.model.attend import CachedAttention
from gemma_deploy.model.kv_cache import Step
from gemma_deploy.model.loading import load_parameters
from gemma_deploy.model.masks import StepMasks
from gemma_deploy.model.norm import RMSNorm
from gemma_deploy.model.rotary import RotaryEmbedding
from gemma_deploy.model.transformer import GemmaDecoderLayer

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Of the widest tensor inside a layer; some five of them live at once.
_STEP_BYTES = 32 << 20
_FLOAT32_BYTES = 4


class LayerWalk:
    """The residual stream of some rows of tokens, carried through the layers in float32.

    Memory holds one layer's weights, the residual stream of all rows and a few rows' activations,
    whatever the number of layers: for Gemma 2B and 32,768 tokens some 1.1 GB.

    Attributes:
        config: The model.
        hidden: The residual stream before the next layer, float32 [R, S, D].
        rows_at_once: Rows that are run together.

    Args:
        checkpoint: Where the weights are.
        token_rows: int64 [R, S]; each row is a text of its own.

    Raises:
        CheckpointError: The weights cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, token_rows: Tensor) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint
        num_tokens = token_rows.shape[1]
        self._step = Step.after(0, num_tokens, torch.device("cpu"), None)
        self._masks = StepMasks(self._step, None, is_bidirectional=False)
        widest = max(self.config.intermediate_size, self.config.num_attention_heads * num_tokens)
        self.rows_at_once = max(1, _STEP_BYTES // (num_tokens * widest * _FLOAT32_BYTES))
        table, index = torch.unique(token_rows, return_inverse=True)
        self.hidden: Tensor = (
            embedding_rows(checkpoint, table)[index] * self.config.hidden_size**0.5
        )

    def layer(self, index: int) -> GemmaDecoderLayer:
        """Read a layer's weights, float32.

        Raises:
            CheckpointError: They cannot be read, or one is not finite.
        """
        return self._loaded(lambda: GemmaDecoderLayer(self.config, index), f"model.layers.{index}.")

    def last_norm(self) -> RMSNorm:
        """Read the norm after the last layer.

        Raises:
            CheckpointError: See `layer`.
        """
        config = self.config
        return self._loaded(lambda: RMSNorm(config.hidden_size, config.rms_norm_eps), "model.norm.")

    @torch.no_grad()
    def outputs(
        self, layer: GemmaDecoderLayer, hidden: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Run a layer on all rows, a few at a time; hooks on its modules see what it computes.

        Args:
            layer: From `layer`, its weights changed or not.
            hidden: The layer's input [R, S, D]; None for `self.hidden`.

        Yields:
            Which rows were run, and the layer's output of them [rows, S, D].
        """
        source = self.hidden if hidden is None else hidden
        for start in range(0, len(source), self.rows_at_once):
            rows = slice(start, start + self.rows_at_once)
            yield rows, layer(source[rows], self.attend())[0]

    def attend(self) -> CachedAttention:
        """Return the attention that a layer is called with for some of the rows."""
        return CachedAttention(
            rotary=RotaryEmbedding(self.config),
            position_ids=self._step.positions,
            step=self._step,
            masks=self._masks,
            cache=None,
            implementation="sdpa",
        )

    def advance(self, layer: GemmaDecoderLayer, hidden: Tensor | None = None) -> None:
        """Run a layer on all rows and put its outputs in the place of its inputs.

        Args:
            layer: From `layer`, its weights changed or not.
            hidden: A residual stream of one's own [R, S, D], changed; None for `self.hidden`.
        """
        target = self.hidden if hidden is None else hidden
        for rows, output in self.outputs(layer, target):
            target[rows] = output

    def _loaded(self, build: Callable[[], ModuleT], prefix: str) -> ModuleT:
        with torch.device("meta"):
            module = build()
        load_parameters(
            module,
            self._checkpoint,
            dtype=torch.float32,
            device=torch.device("cpu"),
            prefix=prefix,
        )
        for name, parameter in module.named_parameters():
            check_finite(parameter, f"{prefix}{name}")
        return module.eval()


def embedding_rows(checkpoint: Checkpoint, token_ids: Tensor) -> Tensor:
    """Read some tokens' rows of the embedding table, float32 [len(token_ids), D], not yet scaled.

    Raises:
        CheckpointError: The table cannot be read, or a row is not finite.
    """
    info = checkpoint.tensors[EMBEDDING_WEIGHT]
    raw = torch.empty(len(token_ids), info.shape[1], dtype=getattr(torch, DTYPE_NAMES[info.dtype]))
    for row, token_id in zip(raw, token_ids.tolist(), strict=True):
        target = row.view(torch.uint8).numpy().data
        checkpoint.read_rows(EMBEDDING_WEIGHT, token_id, token_id + 1, target)
    check_finite(raw, EMBEDDING_WEIGHT)
    return raw.float()


def check_readable(energy: Tensor, matrix: str) -> None:
    """Refuse squares of what a matrix reads that are NaN or infinite.

    Raises:
        CheckpointError: With the matrix's name.
    """
    if not bool(torch.isfinite(energy).all()):
        raise CheckpointError(
            f"what {matrix} reads on the calibration text is NaN or too large to be squared in float32: a "
            "weight before it is damaged; download the checkpoint again"
        )


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse a weight that is NaN or infinite.

    Raises:
        CheckpointError: With the tensor's name.
    """
    # The extremes speak for all, and are found eight times as fast as isfinite looks at every one.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        raise CheckpointError(
            f"{name} holds NaN or infinity: the checkpoint is damaged; download it again"
        )

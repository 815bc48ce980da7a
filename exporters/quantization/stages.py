"""What a layer's matrices read, one stage after the other: `STAGES`, `stage_inputs`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma_deploy.exporters.calibration.layer_walk import LayerWalk
from gemma_deploy.model.transformer import GemmaDecoderLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Matrices of a layer that read the same input.

    Attributes:
        matrices: Their names within the layer.
        source: What makes the input, up to a product of channels: the norm or projection before.
        is_added: Whether the output goes into the residual stream, which the layer has read.
    """

    matrices: tuple[str, ...]
    source: str
    is_added: bool


def stages_of(layer: GemmaDecoderLayer) -> tuple[Stage, ...]:
    """Return a layer's stages in the order in which they are computed."""
    second_norm = (
        "pre_feedforward_layernorm" if layer.has_post_norms else "post_attention_layernorm"
    )
    # Behind a post-norm an output is no longer a linear function of the weights.
    is_added = not layer.has_post_norms
    return (
        Stage(
            matrices=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            source="input_layernorm",
            is_added=False,
        ),
        Stage(matrices=("self_attn.o_proj",), source="self_attn.v_proj", is_added=is_added),
        Stage(matrices=("mlp.gate_proj", "mlp.up_proj"), source=second_norm, is_added=False),
        Stage(matrices=("mlp.down_proj",), source="mlp.up_proj", is_added=is_added),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """What a stage reads for some tokens.

    Attributes:
        inputs: Of the matrices, float32 [tokens, K].
        residual: The residual stream that the stage's output is added to, [tokens, D].
    """

    inputs: Tensor
    residual: Tensor


def stage_inputs(
    walk: LayerWalk, layer: GemmaDecoderLayer, stage: Stage, hidden: Tensor
) -> Iterator[StageInput]:
    """Run a layer up to a stage, a few rows at a time.

    Args:
        walk: Runs it.
        layer: The layer.
        stage: The stage.
        hidden: The layer's input [R, S, D].
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_module: object, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0].flatten(0, 1)
            if name == "inputs":
                raise _ReachedError

        return hook

    # Attention's output is added to the layer's input, the feed-forward's to what its norm reads.
    is_attention = stage.matrices[0].startswith("self_attn")
    before = layer.input_layernorm if is_attention else layer.get_submodule(_mlp_norm(layer))
    handles = [
        before.register_forward_pre_hook(keep("residual")),
        layer.get_submodule(stage.matrices[0]).register_forward_pre_hook(keep("inputs")),
    ]
    try:
        with torch.no_grad():
            for start in range(0, len(hidden), walk.rows_at_once):
                try:
                    layer(hidden[start : start + walk.rows_at_once], walk.attend())
                except _ReachedError:
                    yield StageInput(inputs=seen["inputs"], residual=seen["residual"])
    finally:
        for handle in handles:
            handle.remove()


def _mlp_norm(layer: GemmaDecoderLayer) -> str:
    return next(stage.source for stage in stages_of(layer) if "mlp.gate_proj" in stage.matrices)


class _ReachedError(Exception):
    """Ends a forward pass where nothing behind is needed."""

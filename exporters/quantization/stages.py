"""What a layer's matrices read, one stage after the other: `stages_of`, `stage_inputs`."""

import contextlib
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


class StagedStream:
    """A residual stream on its way through one layer, whose matrices may change before they are used.

    Every matrix is multiplied with once, those before the last stage twice. Memory holds the stream,
    and beside it what `o_proj` reads or the stream between attention and feed-forward.

    Args:
        walk: Runs the layer.
        layer: The layer.
        hidden: Its input [R, S, D]; `finish` puts the layer's output in its place.
    """

    def __init__(self, walk: LayerWalk, layer: GemmaDecoderLayer, hidden: Tensor) -> None:
        self._walk = walk
        self._layer = layer
        self._hidden = hidden
        self._attended: list[Tensor] = []
        self._between = torch.empty(0)

    @torch.no_grad()
    def inputs(self, stage: Stage) -> Iterator[StageInput]:
        """Yield what a stage reads, a few rows at a time; stages are to be asked for in their order."""
        layer = self._layer
        if "self_attn.q_proj" in stage.matrices:
            for rows in self._rows():
                yield _stage_input(layer.input_layernorm(self._hidden[rows]), self._hidden[rows])
        elif "self_attn.o_proj" in stage.matrices:
            for rows, run in zip(
                self._rows(), stage_inputs(self._walk, layer, stage, self._hidden), strict=True
            ):
                self._attended.append(run.inputs.view(*self._hidden[rows].shape[:2], -1))
                yield run
        elif "mlp.gate_proj" in stage.matrices:
            self._end_attention()
            for rows in self._rows():
                yield _stage_input(self._normed(rows), self._between[rows])
        else:
            for rows in self._rows():
                yield _stage_input(self._gated(rows), self._between[rows])

    @torch.no_grad()
    def finish(self) -> None:
        """Put the layer's output in the stream's place."""
        layer = self._layer
        for rows in self._rows():
            fed = layer.mlp.down_proj(self._gated(rows))
            if layer.has_post_norms:
                fed = layer.post_feedforward_layernorm(fed)
            self._hidden[rows] = self._between[rows] + fed

    def _rows(self) -> Iterator[slice]:
        for start in range(0, len(self._hidden), self._walk.rows_at_once):
            yield slice(start, start + self._walk.rows_at_once)

    def _end_attention(self) -> None:
        layer = self._layer
        self._between = torch.empty_like(self._hidden)
        for rows in self._rows():
            attended = layer.self_attn.o_proj(self._attended.pop(0))
            if layer.has_post_norms:
                attended = layer.post_attention_layernorm(attended)
            self._between[rows] = self._hidden[rows] + attended

    def _normed(self, rows: slice) -> Tensor:
        norm = self._layer.get_submodule(_mlp_norm(self._layer))
        normed: Tensor = norm(self._between[rows])
        return normed

    def _gated(self, rows: slice) -> Tensor:
        seen: list[Tensor] = []
        mlp = self._layer.mlp
        handle = mlp.down_proj.register_forward_pre_hook(_keep_and_end(seen))
        with handle, contextlib.suppress(_ReachedError):
            mlp(self._normed(rows))
        return seen[0]


def _stage_input(inputs: Tensor, residual: Tensor) -> StageInput:
    return StageInput(inputs=inputs.flatten(0, 1), residual=residual.flatten(0, 1))


def _keep_and_end(seen: list[Tensor]) -> Callable[[Any, tuple[Tensor, ...]], None]:
    def hook(_module: object, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise _ReachedError

    return hook


def _mlp_norm(layer: GemmaDecoderLayer) -> str:
    return next(stage.source for stage in stages_of(layer) if "mlp.gate_proj" in stage.matrices)


class _ReachedError(Exception):
    """Ends a forward pass where nothing behind is needed."""

"""How much each input of a matrix counts: `measure_importance`.

llama.cpp calls it an importance matrix: the mean of the squares of what a matrix reads, channel by
channel. Where inputs are independent, the error of an output is the sum of the squared errors of its
weights, each counting that much.
"""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.exporters.calibration.layer_walk import LayerWalk, check_readable
from gemma_deploy.exporters.quantization.stages import stages_of
from gemma_deploy.exporters.quantization.tables import EMBEDDING_SHARE
from gemma_deploy.exporters.quantization.work_folder import OnProgress, WorkFolder
from gemma_deploy.model.transformer import GemmaDecoderLayer

# A channel that the text leaves quiet may still be heard in another.
_LEAST_SHARE: Final = 0.01
# What is done is written down when it would be a pity to do it again.
_SECONDS_BETWEEN_SAVES: Final = 60.0
_WORK: Final = "importance"
_HIDDEN: Final = "hidden"


def measure_importance(
    checkpoint: Checkpoint,
    token_rows: Tensor,
    matrices: Collection[str],
    work: WorkFolder,
    on_progress: OnProgress,
) -> dict[str, Tensor]:
    """Run a model on a text, one layer in memory at a time, and say what its matrices read.

    Args:
        checkpoint: The model.
        token_rows: What it reads, int64 [R, S].
        matrices: Which matrices to measure, by the checkpoint's names.
        work: Where an interrupted run of more than a minute goes on from.
        on_progress: Called as the work goes on.

    Returns:
        What a squared error of an element of each column counts, float32 [K] per matrix; positive, and
        the same everywhere for a table that only embeds.

    Raises:
        CheckpointError: The weights cannot be read, or one is not finite.
        ExportError: The work folder cannot be written.
    """
    walk = LayerWalk(checkpoint, token_rows)
    energies: dict[str, Tensor] = {}
    first = 0
    kept = work.find(_WORK)
    if kept is not None:
        energies = load_file(kept)
        walk.hidden = energies.pop(_HIDDEN)
        first = 1 + max(int(name.split(".")[2]) for name in energies)
    saved = time.monotonic()
    num_layers = checkpoint.config.num_hidden_layers
    for index in range(first, num_layers):
        on_progress("reading the text", index, num_layers)
        layer = walk.layer(index)
        with _energies(layer) as seen:
            walk.advance(layer)
        for name, energy in seen.items():
            check_readable(energy, f"model.layers.{index}.{name}")
            energies[f"model.layers.{index}.{name}.weight"] = energy / token_rows.numel()
        # Before the next one is read.
        del layer
        if time.monotonic() - saved >= _SECONDS_BETWEEN_SAVES:
            work.save(_WORK, {**energies, _HIDDEN: walk.hidden})
            saved = time.monotonic()
    on_progress("reading the text", num_layers, num_layers)
    energies |= _of_tables(checkpoint, walk)
    return {name: raised(energies[name]) for name in matrices}


@contextmanager
def _energies(layer: GemmaDecoderLayer) -> Iterator[Mapping[str, Tensor]]:
    """Sum the squares of what a layer's matrices read inside the block, [K] by name in the layer."""
    energies: dict[str, Tensor] = {}

    def add(names: Collection[str], inputs: Tensor) -> None:
        energy = inputs.flatten(0, -2).square().sum(0)
        for name in names:
            energies[name] = energies[name] + energy if name in energies else energy

    handles = [
        layer.get_submodule(stage.matrices[0]).register_forward_pre_hook(
            lambda _module, arguments, names=stage.matrices: add(names, arguments[0])
        )
        for stage in stages_of(layer)
    ]
    try:
        yield energies
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _of_tables(checkpoint: Checkpoint, walk: LayerWalk) -> dict[str, Tensor]:
    """Return what the embedding table and the head read, at the end of a walk."""
    energy = walk.last_norm()(walk.hidden).flatten(0, 1).square().mean(0)
    if HEAD_WEIGHT in checkpoint.tensors:
        return {HEAD_WEIGHT: energy, EMBEDDING_WEIGHT: torch.ones_like(energy)}
    return {EMBEDDING_WEIGHT: energy + EMBEDDING_SHARE * energy.mean()}


def raised(energy: Tensor) -> Tensor:
    """Return mean squares of inputs [K] so that no channel counts for nothing."""
    floor = _LEAST_SHARE * float(energy.mean())
    return energy + (floor or 1.0)

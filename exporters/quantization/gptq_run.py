"""GPTQ on a whole model, one layer in memory at a time: `run_gptq`.

Two residual streams walk through the layers, the original's and that of the layers quantized so far.
Each matrix is asked to give, for the second stream's inputs, what the original gives for the first's:
its weights are moved by the least-squares solution of the difference before they are rounded. So later
matrices make up for earlier ones' errors, also for those that the residual stream carries past them
(compare GPTAQ, https://arxiv.org/abs/2504.02692).
"""

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT
from gemma_deploy.exporters.calibration.layer_walk import LayerWalk, check_readable
from gemma_deploy.exporters.quantization.gptq import Gptq
from gemma_deploy.exporters.quantization.stages import Stage, StagedStream, stages_of
from gemma_deploy.exporters.quantization.tables import embedded, quantize_tables
from gemma_deploy.exporters.quantization.work_folder import OnProgress, WorkFolder
from gemma_deploy.model.transformer import GemmaDecoderLayer
from gemma_deploy.quantization.codes import Quantized, dequantize, pack, unpack
from gemma_deploy.quantization.formats import WeightFormat, scales_name

MAX_COLUMNS: Final = 4096
"""Wider matrices are taken in slices of columns as if these were independent: what is remembered of
the inputs grows with the square of the width."""


def run_gptq(
    checkpoint: Checkpoint,
    token_rows: Tensor,
    formats: Mapping[str, WeightFormat],
    work: WorkFolder,
    on_progress: OnProgress,
) -> dict[str, Path]:
    """Quantize matrices to int4 and int8.

    Args:
        checkpoint: The model.
        token_rows: What it reads, int64 [R, S].
        formats: int4 or int8 formats of matrices, by the checkpoint's names.
        work: Where finished layers are kept, and found again.
        on_progress: Called as the work goes on.

    Returns:
        Safetensors files of the parts of quantized matrices, by name.

    Raises:
        CheckpointError: The weights cannot be read, or one is not finite.
    """
    prepared = quantize_tables(checkpoint, token_rows, formats, work, on_progress)
    walk = LayerWalk(checkpoint, token_rows)
    rounded_hidden = embedded(
        checkpoint, token_rows, formats.get(EMBEDDING_WEIGHT), prepared.get(EMBEDDING_WEIGHT)
    )
    num_layers = checkpoint.config.num_hidden_layers
    for index in range(num_layers):
        on_progress("quantizing layers", index, num_layers)
        layer = walk.layer(index)
        rounded = copy.deepcopy(layer)
        in_layer = {
            name.removeprefix(f"model.layers.{index}.").removesuffix(".weight"): weight_format
            for name, weight_format in formats.items()
            if name.startswith(f"model.layers.{index}.")
        }
        streams = (
            StagedStream(walk, layer, walk.hidden),
            StagedStream(walk, rounded, rounded_hidden),
        )
        run = _LayerRun(rounded, streams, in_layer)
        path = work.find(f"layer-{index}")
        if path is None:
            path = work.save(f"layer-{index}", run.quantize(f"model.layers.{index}."))
            for stream in streams:
                stream.finish()
        else:
            run.take(path, f"model.layers.{index}.")
            walk.advance(layer)
            walk.advance(rounded, rounded_hidden)
        prepared |= {f"model.layers.{index}.{matrix}.weight": path for matrix in in_layer}
        # Before the next one is read.
        del layer, rounded, run, streams
    on_progress("quantizing layers", num_layers, num_layers)
    return prepared


class _LayerRun:
    """One layer on its way to being quantized.

    Args:
        rounded: A copy of the original, whose matrices become the quantized ones.
        streams: The original's stream through the original, and the quantized one's through the copy.
        formats: int4 or int8 formats of matrices, by their names in the layer (`mlp.up_proj`).
    """

    def __init__(
        self,
        rounded: GemmaDecoderLayer,
        streams: tuple[StagedStream, StagedStream],
        formats: Mapping[str, WeightFormat],
    ) -> None:
        self._rounded = rounded
        self._streams = streams
        self._formats = formats

    def quantize(self, prefix: str) -> dict[str, Tensor]:
        """Quantize stage after stage; return the parts of the matrices."""
        tensors: dict[str, Tensor] = {}
        for stage in stages_of(self._rounded):
            names = [name for name in stage.matrices if name in self._formats]
            for name, quantized in zip(names, self._calibrated(stage, names), strict=True):
                stored = f"{prefix}{name}.weight"
                tensors[stored] = pack(quantized.codes, self._formats[name])
                tensors[scales_name(stored)] = quantized.scales
                self._put(name, quantized)
        return tensors

    def take(self, path: Path, prefix: str) -> None:
        """Take what an earlier run quantized into the copy."""
        stored = load_file(path)
        for name, weight_format in self._formats.items():
            full = f"{prefix}{name}.weight"
            codes = unpack(stored[full], weight_format)
            self._put(name, Quantized(codes, stored[scales_name(full)]))

    def _calibrated(self, stage: Stage, names: Sequence[str]) -> list[Quantized]:
        """Quantize matrices of a stage by what they read."""
        if not names:
            for stream in self._streams:  # later stages go on from what this one reads
                deque(stream.inputs(stage), maxlen=0)
            return []
        statistics = self._statistics(stage)
        for part in statistics:
            check_readable(part.energy, names[0])
        weights, formats = [self._weight(x) for x in names], [self._formats[x] for x in names]
        slices = [part.quantize(weights, formats) for part in statistics]
        return [
            Quantized(
                torch.cat([x.codes for x in parts], 1), torch.cat([x.scales for x in parts], 1)
            )
            for parts in zip(*slices, strict=True)
        ]

    def _weight(self, name: str) -> Tensor:
        return self._rounded.get_parameter(f"{name}.weight").data

    def _put(self, name: str, quantized: Quantized) -> None:
        weight = dequantize(quantized, self._formats[name])
        self._rounded.get_parameter(f"{name}.weight").data = weight

    def _statistics(self, stage: Stage) -> "list[_Statistics]":
        """Look at what a stage reads in both streams, slice of columns by slice."""
        width = self._rounded.get_parameter(f"{stage.matrices[0]}.weight").shape[1]
        slices = [slice(i, min(i + MAX_COLUMNS, width)) for i in range(0, width, MAX_COLUMNS)]
        statistics = [_Statistics(part) for part in slices]
        pairs = (stream.inputs(stage) for stream in self._streams)
        for own, other in zip(*pairs, strict=True):
            # Slices are independent of each other: each makes up for its share.
            missing = (own.residual - other.residual) / len(slices) if stage.is_added else None
            for part in statistics:
                part.add(own.inputs, other.inputs, missing)
        return statistics


class _Statistics:
    """Products of a slice of a stage's inputs, summed over tokens."""

    def __init__(self, columns: slice) -> None:
        self.columns = columns
        size = columns.stop - columns.start
        self._hessian = torch.zeros(size, size)
        self._mismatch = torch.zeros(size, size)
        self._missing: Tensor | None = None
        self._num_tokens = 0

    def add(self, own: Tensor, other: Tensor, missing: Tensor | None) -> None:
        """Add inputs [tokens, K] of both streams, and what the other's residual lacks [tokens, D]."""
        own, other = own[:, self.columns], other[:, self.columns]
        self._hessian += other.T @ other
        self._mismatch += (own - other).T @ other
        self._num_tokens += len(own)
        if missing is not None:
            product = missing.T @ other
            self._missing = product if self._missing is None else self._missing + product

    @property
    def energy(self) -> Tensor:
        """Sums of the inputs' squares, [K]."""
        return self._hessian.diagonal()

    def quantize(
        self, weights: Sequence[Tensor], formats: Sequence[WeightFormat]
    ) -> list[Quantized]:
        """Quantize this slice of some matrices [N, K].

        They do for the second stream's inputs what the original's do for the first's, as nearly as
        they can.
        """
        gptq = Gptq(self._hessian.div_(self._num_tokens))
        found = []
        for weight, weight_format in zip(weights, formats, strict=True):
            part = weight[:, self.columns]
            lacking = part @ self._mismatch
            if self._missing is not None:
                lacking += self._missing
            target = gptq.target(part, lacking / self._num_tokens)
            found.append(gptq.quantize(target, weight_format, weight=part))
        return found

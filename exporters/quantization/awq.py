"""Input channels scaled by how much is in them before weights are rounded: `run_awq`.

AWQ (https://arxiv.org/abs/2306.00978) multiplies a matrix's column by s and divides its input by it, so
that the weights of strong inputs are rounded in finer steps. The division costs nothing where it folds
into what makes the input: a norm, the value projection (before o_proj), the up projection (before
down_proj). s is a power of the channel's root mean square, the one that leaves the least error.
The table has nothing before it to fold into, and is quantized as for GPTQ.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT
from gemma_deploy.exporters.calibration.layer_walk import LayerWalk, check_readable
from gemma_deploy.exporters.calibration.overflow import MEASURED_HEADROOM
from gemma_deploy.exporters.quantization.importance import raised
from gemma_deploy.exporters.quantization.scale_search import search_scales, storable
from gemma_deploy.exporters.quantization.stages import Stage, stage_inputs, stages_of
from gemma_deploy.exporters.quantization.tables import embedded, quantize_tables
from gemma_deploy.exporters.quantization.work_folder import OnProgress, WorkFolder
from gemma_deploy.model.norm import RMSNorm
from gemma_deploy.model.transformer import GemmaDecoderLayer
from gemma_deploy.quantization.codes import Quantized, dequantize, pack, quantize, unpack
from gemma_deploy.quantization.formats import WeightFormat, scales_name
from gemma_deploy.quantization.grid import is_on_grid

LOSS_TOKENS: Final = 2048
"""Most tokens whose inputs are kept of a matrix, to measure errors on (Gemma 2B: 134 MB)."""

_POWERS = tuple(step / 10 for step in range(11))
# Rows of a matrix that a power is chosen by; they are spread over all of them.
_TRIAL_ROWS = 512
# A channel that is hardly ever used must not drive weights out of float16's range, and what the
# projection before gives may only grow into the headroom that the overflow preflight leaves.
_LARGEST_FACTOR = 64.0
_SMALLEST_FACTOR = 1 / MEASURED_HEADROOM
_NORM_SCALE = ".scale"


def run_awq(
    checkpoint: Checkpoint,
    token_rows: Tensor,
    formats: Mapping[str, WeightFormat],
    work: WorkFolder,
    on_progress: OnProgress,
) -> dict[str, Path]:
    """Quantize matrices to int4 and int8, layer after layer, on inputs that those before them make.

    Args:
        checkpoint: The model.
        token_rows: What it reads, int64 [R, S].
        formats: int4 or int8 formats of matrices, by the checkpoint's names.
        work: Where finished layers are kept, and found again.
        on_progress: Called as the work goes on.

    Returns:
        Safetensors files of the parts of quantized matrices and of divided norms, by their names in
        the weights file.

    Raises:
        CheckpointError: The weights cannot be read, or one is not finite.
    """
    prepared = quantize_tables(checkpoint, token_rows, formats, work, on_progress)
    walk = LayerWalk(checkpoint, token_rows)
    walk.hidden = embedded(
        checkpoint, token_rows, formats.get(EMBEDDING_WEIGHT), prepared.get(EMBEDDING_WEIGHT)
    )
    num_layers = checkpoint.config.num_hidden_layers
    for index in range(num_layers):
        on_progress("quantizing layers", index, num_layers)
        prefix = f"model.layers.{index}."
        in_layer = {
            name.removeprefix(prefix).removesuffix(".weight"): weight_format
            for name, weight_format in formats.items()
            if name.startswith(prefix)
        }
        layer = walk.layer(index)
        path = work.find(f"layer-{index}")
        if path is None:
            quantized = AwqLayer(walk, copy.deepcopy(layer), in_layer).quantize()
            named = {f"{prefix}{name}": part for name, part in quantized.items()}
            path = work.save(f"layer-{index}", named)
        # From the file in any case, so that a continued run computes the same.
        prepared |= dict.fromkeys(_take(layer, path, prefix, in_layer), path)
        walk.advance(layer)
    on_progress("quantizing layers", num_layers, num_layers)
    return prepared


@torch.no_grad()
def _take(
    layer: GemmaDecoderLayer, path: Path, prefix: str, formats: Mapping[str, WeightFormat]
) -> list[str]:
    """Give a layer the values of a file of its parts; return the names of what the file holds."""
    stored = load_file(path)
    names = [f"{prefix}{matrix}.weight" for matrix in formats]
    for name, (matrix, weight_format) in zip(names, formats.items(), strict=True):
        quantized = Quantized(unpack(stored[name], weight_format), stored[scales_name(name)])
        layer.get_parameter(f"{matrix}.weight").copy_(dequantize(quantized, weight_format))
    for name, scale in stored.items():
        if name.endswith(_NORM_SCALE):
            norm = name.removeprefix(prefix).removesuffix(_NORM_SCALE)
            _fold(layer.get_submodule(norm), scale)
            names.append(name)
    return names


def _fold(norm: object, scale: Tensor) -> None:
    """Give a norm its 1 + w."""
    if isinstance(norm, RMSNorm):
        norm.weight.data = scale
        norm.is_folded = True


class AwqLayer:
    """One layer on its way to being quantized.

    Args:
        walk: Holds the residual stream before the layer.
        layer: The layer; its matrices take the values of their codes, its norms are divided.
        formats: int4 or int8 formats of matrices, by their names in the layer (`mlp.up_proj`).
    """

    def __init__(
        self, walk: LayerWalk, layer: GemmaDecoderLayer, formats: Mapping[str, WeightFormat]
    ) -> None:
        self._walk = walk
        self._layer = layer
        self._formats = formats
        self._quantized: dict[str, Quantized] = {}
        self._norms: dict[str, Tensor] = {}

    @torch.no_grad()
    def quantize(self) -> dict[str, Tensor]:
        """Quantize stage after stage; return parts of matrices, and 1 + w of divided norms."""
        for stage in stages_of(self._layer):
            names = [name for name in stage.matrices if name in self._formats]
            if names:
                self._quantize_stage(stage, names)
        parts = {f"{norm}{_NORM_SCALE}": scale for norm, scale in self._norms.items()}
        for name, (codes, scales) in self._quantized.items():
            parts[f"{name}.weight"] = pack(codes, self._formats[name])
            parts[scales_name(f"{name}.weight")] = scales
        return parts

    def _quantize_stage(self, stage: Stage, names: Sequence[str]) -> None:
        inputs = self._inputs(stage)
        check_readable(inputs.square().sum(0), stage.matrices[0])
        ones = torch.ones(inputs.shape[-1])
        factors = ones
        # A matrix that stays dense would have to change with the others, and one that lies on a grid
        # would leave it.
        is_free = len(names) == len(stage.matrices) and not any(map(self._is_on_grid, names))
        if is_free and self._takes_factors(stage.source):
            factors = self._best_factors(stage, inputs)
            if not self._is_better(names, inputs, factors):
                factors = ones
        found = {name: self._rounded(name, inputs, factors) for name in names}
        for name, quantized in found.items():
            self._quantized[name] = quantized
            self._show(name)
        if factors is not ones:
            self._divide(stage.source, factors)

    def _inputs(self, stage: Stage) -> Tensor:
        """Return what a stage reads for some tokens, float32 [tokens, K]."""
        stride = -(-self._walk.hidden[..., 0].numel() // LOSS_TOKENS)
        runs = stage_inputs(self._walk, self._layer, stage, self._walk.hidden)
        return torch.cat([run.inputs[::stride].clone() for run in runs])

    def _takes_factors(self, source: str) -> bool:
        """Tell whether what makes an input can be divided: a bias would have to be, too."""
        if source.endswith("norm"):
            return True
        has_bias = self._walk.config.attention_bias and source.endswith("v_proj")
        return source in self._formats and not has_bias

    def _is_on_grid(self, name: str) -> bool:
        weight, weight_format = self._weight(name), self._formats[name]
        if weight_format.scheme != "int4":
            return False
        return bool(is_on_grid(weight, weight_format.block_size or weight.shape[-1]).all())

    def _best_factors(self, stage: Stage, inputs: Tensor) -> Tensor:
        """Return the factor s of each input channel, float32 [K]."""
        energy = inputs.square().mean(0)
        if stage.source == "self_attn.v_proj":
            energy = self._shared_by_queries(energy)
        strength = energy.clamp(min=1e-12).sqrt()
        best, least = torch.ones_like(strength), float("inf")
        for power in _POWERS:
            factors = strength**power
            factors = factors / factors.log().mean().exp()
            factors = factors.clamp(_SMALLEST_FACTOR, _LARGEST_FACTOR)
            loss = sum(self._trial_loss(name, inputs, factors) for name in stage.matrices)
            if loss < least:
                best, least = factors, loss
        return best

    def _shared_by_queries(self, energy: Tensor) -> Tensor:
        """Give the channels [N * H] that read one value channel the same energy, their mean."""
        config = self._walk.config
        grouped = energy.view(config.num_key_value_heads, -1, config.head_dim)
        return grouped.mean(1, keepdim=True).expand_as(grouped).reshape(-1)

    def _trial_loss(self, name: str, inputs: Tensor, factors: Tensor) -> float:
        weight = self._weight(name)
        weight = weight[:: -(-len(weight) // _TRIAL_ROWS)]
        scaled = weight * factors
        weight_format = self._formats[name]
        scales = search_scales(scaled, _counts(inputs, factors), weight_format)
        found = dequantize(quantize(scaled, weight_format, scales.half()), weight_format)
        return float(_losses(weight - found / factors, inputs).mean())

    def _is_better(self, names: Sequence[str], inputs: Tensor, factors: Tensor) -> bool:
        """Tell whether factors lower the error of all rows below that of rounding to nearest."""
        gain = 0.0
        for name in names:
            weight, weight_format = self._weight(name), self._formats[name]
            found = dequantize(self._rounded(name, inputs, factors), weight_format) / factors
            nearest = dequantize(quantize(weight, weight_format), weight_format)
            gain += float(_losses(weight - nearest, inputs).sum())
            gain -= float(_losses(weight - found, inputs).sum())
        return gain > 0

    def _rounded(self, name: str, inputs: Tensor, factors: Tensor) -> Quantized:
        """Return codes of the scaled matrix; each row with the better of two choices of scales."""
        weight_format = self._formats[name]
        scaled = self._weight(name) * factors
        scales = search_scales(scaled, _counts(inputs, factors), weight_format)
        found = quantize(scaled, weight_format, scales.half())
        nearest = quantize(scaled, weight_format)
        losses = [
            _losses((scaled - dequantize(choice, weight_format)) / factors, inputs)
            for choice in (found, nearest)
        ]
        is_better = (losses[0] <= losses[1]).unsqueeze(-1)
        return Quantized(
            *(torch.where(is_better, *pair) for pair in zip(found, nearest, strict=True))
        )

    def _divide(self, source: str, factors: Tensor) -> None:
        module = self._layer.get_submodule(source)
        if isinstance(module, RMSNorm):
            self._norms[source] = (module.weight + 1.0) / factors
            _fold(module, self._norms[source])
            return
        if source == "self_attn.v_proj":
            config = self._walk.config
            factors = factors.view(config.num_key_value_heads, -1, config.head_dim)[:, 0].flatten()
        codes, scales = self._quantized[source]
        # All weights of a row are divided alike, so that its codes stay what they are.
        divided = storable(scales.float() / factors.unsqueeze(-1)).half()
        self._quantized[source] = Quantized(codes, divided)
        self._show(source)

    def _weight(self, name: str) -> Tensor:
        return self._layer.get_parameter(f"{name}.weight")

    def _show(self, name: str) -> None:
        """Give a matrix of the changed layer the values of its codes."""
        values = dequantize(self._quantized[name], self._formats[name])
        self._layer.get_parameter(f"{name}.weight").copy_(values)


def _counts(inputs: Tensor, factors: Tensor) -> Tensor:
    """Return what a squared error of an element of each scaled column counts, [K]."""
    return raised(inputs.square().mean(0)) / factors.square()


def _losses(error: Tensor, inputs: Tensor) -> Tensor:
    """Return the mean squared error of each output [N] that errors of weights [N, K] make."""
    return (inputs @ error.T).square_().mean(0)

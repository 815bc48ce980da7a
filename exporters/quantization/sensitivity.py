"""How much a model minds each matrix being rounded: `measure_sensitivities`.

One walk through the layers carries several residual streams: the model's own, one for each layer with
that layer rounded, and one for each format of the embedding table. What they do to the logits at the
end is measured as KL divergence. Within a layer, the divergence is shared out by how far rounding each
matrix alone moves the layer's output, which was measured on the way.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.exporters.calibration.kl_sum import KLSum, capped
from gemma_deploy.exporters.calibration.layer_walk import LayerWalk
from gemma_deploy.exporters.quantization.tables import embedded
from gemma_deploy.exporters.quantization.work_folder import OnProgress
from gemma_deploy.model.transformer import GemmaDecoderLayer
from gemma_deploy.quantization.codes import dequantize, quantize
from gemma_deploy.quantization.formats import WeightFormat

Sensitivities = Mapping[str, Mapping[WeightFormat, float]]
"""Matrix -> format -> mean KL divergence in nats that rounding it alone costs."""

_HEAD_BLOCK_BYTES = 16 << 20


def measure_sensitivities(
    checkpoint: Checkpoint,
    token_rows: Tensor,
    candidates: Mapping[str, Sequence[WeightFormat]],
    on_progress: OnProgress = lambda *_: None,
) -> Sensitivities:
    """Measure what rounding each matrix to nearest costs, in each of its formats.

    Memory holds one layer in float32 and L + F residual streams, F being the formats of the table;
    time grows with L squared.

    Args:
        checkpoint: The model.
        token_rows: What it reads, int64 [R, S].
        candidates: Quantized formats to try, by the checkpoint's names, the coarsest first.
        on_progress: Called as the work goes on.

    Returns:
        Mean KL divergence from the float32 model, in nats a token.

    Raises:
        CheckpointError: The weights cannot be read, or one is not finite.
    """
    walk = LayerWalk(checkpoint, token_rows)
    num_layers = walk.config.num_hidden_layers
    tables = list(candidates.get(EMBEDDING_WEIGHT, ()))
    streams = [embedded(checkpoint, token_rows, table, None) for table in tables]
    shares: list[dict[str, dict[WeightFormat, float]]] = []
    for index in range(num_layers):
        on_progress("measuring sensitivities", index, num_layers + 1)
        layer = walk.layer(index)
        for stream in streams:
            walk.advance(layer, stream)
        rounded, errors = _rounded_layer(walk, layer, index, candidates)
        walk.advance(layer)
        streams.append(rounded)
        shares.append(errors)
    on_progress("measuring sensitivities", num_layers, num_layers + 1)
    head = HEAD_WEIGHT if HEAD_WEIGHT in checkpoint.tensors else EMBEDDING_WEIGHT
    norm = walk.last_norm()
    with torch.no_grad():
        own = norm(walk.hidden).flatten(0, 1)
        finals = [norm(stream).flatten(0, 1) for stream in streams]
    # A tied table is rounded at both of its ends.
    at_head = tables if head == EMBEDDING_WEIGHT else [None] * len(tables)
    untied = [] if head == EMBEDDING_WEIGHT else list(candidates.get(head, ()))
    compared = [
        *zip(finals, [*at_head, *[None] * num_layers], strict=True),
        *((own, weight_format) for weight_format in untied),
    ]
    costs = mean_kl(checkpoint, head, own, compared)
    on_progress("measuring sensitivities", num_layers + 1, num_layers + 1)
    found: dict[str, Mapping[WeightFormat, float]] = {}
    if tables:
        found[EMBEDDING_WEIGHT] = dict(zip(tables, costs, strict=False))
    for errors, cost in zip(shares, costs[len(tables) :], strict=False):
        found |= _shared_out(errors, cost)
    if untied:
        found[head] = dict(zip(untied, costs[-len(untied) :], strict=True))
    return found


def mean_kl(
    checkpoint: Checkpoint,
    head: str,
    reference: Tensor,
    others: Sequence[tuple[Tensor, WeightFormat | None]],
) -> list[float]:
    """Return the mean KL divergence of next-token distributions from a reference's, in nats.

    The head is read in blocks of rows, so neither it nor the logits are ever in memory whole.

    Args:
        checkpoint: Where the head is.
        head: Its name.
        reference: Normalized hidden states [tokens, D] of the reference.
        others: The same of what is compared, each with what the head is rounded to.
    """
    info, cap = checkpoint.tensors[head], checkpoint.config.final_logit_softcapping
    dtype = getattr(torch, DTYPE_NAMES[info.dtype])
    sums = [KLSum(len(reference)) for _ in others]
    for start, stop in checkpoint.row_blocks(head, _HEAD_BLOCK_BYTES):
        raw = bytearray((stop - start) * info.row_bytes)
        checkpoint.read_rows(head, start, stop, memoryview(raw))
        rows = torch.frombuffer(raw, dtype=dtype).view(stop - start, -1).float()
        rounded = {None: rows} | {
            weight_format: _rounded(rows, weight_format)
            for _, weight_format in others
            if weight_format is not None
        }
        own = capped(reference @ rows.T, cap)
        for total, (hidden, weight_format) in zip(sums, others, strict=True):
            total.add(own, capped(hidden @ rounded[weight_format].T, cap))
    return [total.mean() for total in sums]


@torch.no_grad()
def _rounded_layer(
    walk: LayerWalk,
    layer: GemmaDecoderLayer,
    index: int,
    candidates: Mapping[str, Sequence[WeightFormat]],
) -> tuple[Tensor, dict[str, dict[WeightFormat, float]]]:
    """Return the layer's output with all its matrices rounded, and what each alone moves it by.

    All are rounded to their coarsest format; movements are sums of squares.
    """
    matrices = {
        f"model.layers.{index}.{name}.weight": part
        for name, part in layer.named_modules()
        if isinstance(part, nn.Linear)
    }
    matrices = {name: part for name, part in matrices.items() if candidates.get(name)}
    own = _output(walk, layer)
    errors: dict[str, dict[WeightFormat, float]] = {}
    for name, part in matrices.items():
        original = part.weight.data
        errors[name] = {}
        for weight_format in candidates[name]:
            part.weight.data = _rounded(original, weight_format)
            errors[name][weight_format] = float((_output(walk, layer) - own).square().sum())
        part.weight.data = original
    originals = {name: part.weight.data for name, part in matrices.items()}
    for name, part in matrices.items():
        part.weight.data = _rounded(originals[name], candidates[name][0])
    rounded = _output(walk, layer)
    for name, part in matrices.items():
        part.weight.data = originals[name]
    return rounded, errors


def _output(walk: LayerWalk, layer: GemmaDecoderLayer) -> Tensor:
    return torch.cat([output for _, output in walk.outputs(layer)])


def _shared_out(
    errors: Mapping[str, Mapping[WeightFormat, float]], cost: float
) -> dict[str, Mapping[WeightFormat, float]]:
    """Share a layer's cost out by squared errors, which add up where they are independent."""
    total = sum(next(iter(by_format.values())) for by_format in errors.values()) or 1.0
    return {
        name: {weight_format: cost * error / total for weight_format, error in by_format.items()}
        for name, by_format in errors.items()
    }


def _rounded(weight: Tensor, weight_format: WeightFormat) -> Tensor:
    return dequantize(quantize(weight, weight_format), weight_format)

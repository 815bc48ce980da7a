"""Peaks of activations to the smallest powers of two that let float16 hold them."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import torch

from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.config import GemmaConfig
from gemma_deploy.exporters.weights import is_norm
from gemma_deploy.overflow_report import (
    FLOAT16_MAX,
    OverflowReport,
    Peak,
    Source,
    WeightLoss,
)
from gemma_deploy.residual_scaling import LayerScaling, ResidualScaling

LAYER_TENSORS: Final = (
    "normalized",
    "query",
    "key",
    "value",
    "attention",
    "gate",
    "up",
    "product",
    "feed_forward",
    "residual",
)
OUTER_TENSORS: Final = ("embedding", "final_norm", "logits")

_SMALLEST_NORMAL = 2.0**-14
# Half of the smallest subnormal number rounds to even, which is zero.
_LARGEST_ZEROED = 2.0**-25
_SMALLEST_TOO_LARGE = 65520.0
# Several passes are made over a block: five times as fast where it stays in a core's cache.
_BLOCK_BYTES = 512 << 10


def overflow_report(
    checkpoint: Checkpoint,
    layers: Sequence[Mapping[str, float]],
    outer: Mapping[str, float],
    *,
    source: Source,
    num_tokens: int,
    headroom: float,
    quantized: Collection[str] = (),
) -> OverflowReport:
    """Choose a scaling for peaks, and report both.

    Args:
        checkpoint: The model.
        layers: Peaks of each layer, by the names in `LAYER_TENSORS`.
        outer: Peaks outside of layers, by the names in `OUTER_TENSORS`.
        source: Where the peaks come from.
        num_tokens: Length of the text they were measured on.
        headroom: How many times each scaled peak is to fit float16.
        quantized: See `weight_losses`.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    scaling = smallest_scaling(checkpoint.config, layers, outer, headroom)
    peaks = [
        Peak(layer=i, tensor=name, peak=layer[name], divisor=_divisor(scaling, i, name))
        for i, layer in enumerate(layers)
        for name in LAYER_TENSORS
    ]
    peaks += [
        Peak(layer=None, tensor=name, peak=outer[name], divisor=_divisor(scaling, None, name))
        for name in OUTER_TENSORS
    ]
    return OverflowReport(
        source=source,
        num_tokens=num_tokens,
        wanted_headroom=headroom,
        scaling=scaling,
        peaks=tuple(peaks),
        weight_losses=weight_losses(checkpoint, scaling, quantized),
    )


def smallest_scaling(
    config: GemmaConfig,
    layers: Sequence[Mapping[str, float]],
    outer: Mapping[str, float],
    headroom: float,
) -> ResidualScaling:
    """Return the scaling whose every number would break the headroom if it were halved.

    Not larger: each doubling takes a bit from the smallest weights and activations.
    """

    def divisor(peaks: Iterable[float]) -> int:
        return power_of_two(max(peaks) * headroom / FLOAT16_MAX)

    # Without post-norms the sub-layers' outputs are added to the stream as they are.
    added = () if config.has_post_norms else ("attention", "feed_forward")
    streams = (x[name] for x in layers for name in ("residual", *added))
    residual = divisor((outer["embedding"], *streams))
    return ResidualScaling.of(
        config,
        residual,
        tuple(
            LayerScaling(
                value=divisor((x["value"],)),
                attention=divisor((x["attention"],)) if config.has_post_norms else 1,
                up=divisor((x["up"], x["product"])),
                feed_forward=divisor((x["feed_forward"],)) if config.has_post_norms else 1,
            )
            for x in layers
        ),
    )


def power_of_two(least: float) -> int:
    """Return the smallest power of two, 1 or more, that is at least `least`."""
    if least <= 1:
        return 1
    mantissa, exponent = math.frexp(least)
    return 1 << (exponent - 1 if mantissa == 0.5 else exponent)


def weight_losses(
    checkpoint: Checkpoint,
    scaling: ResidualScaling,
    quantized: Collection[str] = (),
) -> tuple[WeightLoss, ...]:
    """Count what float16 loses of matrices and biases, in one streamed pass.

    Args:
        checkpoint: Where the weights are.
        scaling: What they are divided by.
        quantized: Names of those that are not stored in float16, and left out.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    losses = []
    for name, info in checkpoint.tensors.items():
        if is_norm(name) or name in quantized:
            continue  # norms are float32 in every bundle
        divisor = scaling.weight_divisor(name)
        counts = torch.zeros(3, dtype=torch.int64)
        dtype = getattr(torch, DTYPE_NAMES[info.dtype])
        for start, stop in checkpoint.row_blocks(name, _BLOCK_BYTES):
            raw = bytearray((stop - start) * info.row_bytes)
            checkpoint.read_rows(name, start, stop, memoryview(raw))
            counts += _count_losses(torch.frombuffer(raw, dtype=dtype), divisor)
        too_large, subnormal, zeroed = counts.tolist()
        if too_large or subnormal or zeroed:
            losses.append(
                WeightLoss(
                    name=name,
                    divisor=divisor,
                    num_weights=math.prod(info.shape),
                    num_too_large=too_large,
                    num_subnormal=subnormal,
                    num_zeroed=zeroed,
                )
            )
    return tuple(losses)


def _count_losses(block: torch.Tensor, divisor: float) -> torch.Tensor:
    """Return how many weights become infinite, subnormal, zero; int64 [3]."""
    magnitude = block.float().abs_()

    def count(is_lost: torch.Tensor) -> int:
        return int(torch.count_nonzero(is_lost))

    at_most_zeroed = count(magnitude <= _LARGEST_ZEROED * divisor)
    return torch.tensor(
        (
            count(magnitude >= _SMALLEST_TOO_LARGE * divisor),
            count(magnitude < _SMALLEST_NORMAL * divisor) - at_most_zeroed,
            at_most_zeroed - count(magnitude == 0),
        )
    )


def _divisor(scaling: ResidualScaling, layer: int | None, tensor: str) -> float:
    """Return what the exported model divides a tensor by."""
    if layer is None:
        return scaling.embedding_divisor if tensor == "embedding" else 1.0
    inside = scaling.layers[layer]
    match tensor:
        case "value":
            divisor = inside.value
        case "attention" if scaling.has_post_norms:
            divisor = inside.attention
        case "feed_forward" if scaling.has_post_norms:
            divisor = inside.feed_forward
        case "up" | "product":
            divisor = inside.up
        case "residual" | "attention" | "feed_forward":
            divisor = scaling.residual
        case _:
            divisor = 1
    return float(divisor)

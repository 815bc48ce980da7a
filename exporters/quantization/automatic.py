"""Choosing a format for each matrix under a budget of size or of quality: `choose_formats`."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.exporters.quantization.options import QuantizationOptions, is_kept, matrices_of
from gemma_deploy.exporters.quantization.sensitivity import Sensitivities
from gemma_deploy.graph_spec import DType
from gemma_deploy.quantization.choices import Choice
from gemma_deploy.quantization.formats import WeightFormat

_LADDERS: Final = {
    "int4": ("int4/128", "int4/64", "int4/32", "int8/32"),
    "int8": ("int8/128", "int8/32"),
}
"""Formats that are tried for each scheme, the coarsest first; above them a matrix is kept dense."""


def candidates_of(
    config: GemmaConfig, options: QuantizationOptions
) -> dict[str, tuple[WeightFormat, ...]]:
    """Return the quantized formats that each matrix can take, the coarsest first.

    Raises:
        RequestError: No format is known between the scheme and dense weights, or none fits a matrix.
    """
    if options.scheme not in _LADDERS:
        raise RequestError(
            f"--auto with {options.scheme}: formats are chosen between int4 or int8 and 16 bits; "
            "give --int4, --int8 or neither"
        )
    ladder = [WeightFormat.parse(text) for text in _LADDERS[options.scheme]]
    found = {}
    for name, (_, columns) in matrices_of(config):
        fitting = tuple(x for x in ladder if columns % (x.block_size or 1) == 0)
        if name in (EMBEDDING_WEIGHT, HEAD_WEIGHT) and options.embedding_bits is not None:
            fitting = tuple(x for x in fitting if x.bits == options.embedding_bits)
        if fitting and not is_kept(name, config, options):
            found[name] = fitting
    return found


def choose_formats(
    config: GemmaConfig,
    sensitivities: Sensitivities,
    *,
    dense: DType,
    other_bytes: int,
    max_size_bytes: int | None = None,
    max_kl_nats: float | None = None,
) -> list[Choice]:
    """Spend bytes where they take away most divergence, until the budget is met.

    Every matrix starts at its smallest format; then the step up that saves the most nats a byte is
    taken, again and again. Divergences of matrices are taken to add up.

    Args:
        config: The model.
        sensitivities: From `measure_sensitivities`.
        dense: What a matrix that is not quantized is stored in; it costs no divergence.
        other_bytes: Size of everything that is not among `sensitivities`.
        max_size_bytes: Budget of the whole weights file; this or
        max_kl_nats: budget of the sum of divergences.

    Raises:
        RequestError: Even the smallest formats are too large.
    """
    shapes = dict(matrices_of(config))
    ladders = {
        name: _hull(_options(name, shapes[name], costs, dense))
        for name, costs in sensitivities.items()
    }
    level = dict.fromkeys(ladders, 0)
    size = other_bytes + sum(ladder[0].size_bytes for ladder in ladders.values())
    if max_size_bytes is not None and size > max_size_bytes:
        raise RequestError(
            f"--max-size is {max_size_bytes} bytes, and the smallest formats take {size}: allow at "
            "least that, or quantize what --keep-fp16 keeps"
        )
    kl = sum(ladder[0].kl_nats for ladder in ladders.values())
    for before, after in _steps(list(ladders.values())):
        if max_kl_nats is not None and kl <= max_kl_nats:
            break
        # A step that does not fit does not keep a smaller one of another matrix from it; but the
        # steps of one matrix are taken in turn.
        grown = size + after.size_bytes - before.size_bytes
        is_next = ladders[after.name][level[after.name]] is before
        if not is_next or (max_size_bytes is not None and grown > max_size_bytes):
            continue
        level[after.name] += 1
        size, kl = grown, kl + after.kl_nats - before.kl_nats
    return [ladder[level[name]] for name, ladder in ladders.items()]


def _options(
    name: str, shape: tuple[int, ...], costs: Mapping[WeightFormat, float], dense: DType
) -> Iterator[Choice]:
    for weight_format, cost in (*costs.items(), (WeightFormat(dense), 0.0)):
        size = weight_format.size_bytes(shape)
        yield Choice(name=name, format=weight_format, size_bytes=size, kl_nats=cost)


def _hull(options: Iterator[Choice]) -> list[Choice]:
    """Return the options worth having, smallest first: each step up saves less a byte than the last."""
    hull: list[Choice] = []
    for option in sorted(options, key=lambda x: (x.size_bytes, x.kl_nats)):
        if hull and option.kl_nats >= hull[-1].kl_nats:
            continue
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _steps(ladders: Sequence[Sequence[Choice]]) -> list[tuple[Choice, Choice]]:
    """Return the steps up of all matrices, those that save the most nats a byte first."""
    steps = [step for ladder in ladders for step in itertools.pairwise(ladder)]
    return sorted(steps, key=lambda step: -_saving(*step))


def _saving(before: Choice, after: Choice) -> float:
    """Return the nats that a step saves a byte."""
    return (before.kl_nats - after.kl_nats) / (after.size_bytes - before.size_bytes)

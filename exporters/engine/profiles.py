"""Optimization profiles: the sizes that an engine's dynamic dimensions may take, per phase."""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_deploy.engine_build import EngineLimits, Layout
from gemma_deploy.graph_spec import GraphSpec, Phase

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRange:
    """The shapes that an input may have.

    Attributes:
        smallest: Its smallest size along each axis.
        usual: What kernels are chosen for.
        largest: Its largest size along each axis.
    """

    smallest: Shape
    usual: Shape
    largest: Shape


Profile = Mapping[str, ShapeRange]
"""Range of each input, by name."""

_Sizes = Mapping[str, tuple[int, int, int]]


def optimization_profiles(
    spec: GraphSpec, phase: Phase, layout: Layout, limits: EngineLimits
) -> list[Profile]:
    """Return the profiles of the engine that is built for a phase from a graph.

    In layout `one-engine` they are prefill's and decode's, in this order, whatever the phase; in
    `two-engines` the phase's own.

    Args:
        spec: What the graph takes; T is a number.
        phase: What the engine is for.
        layout: How many engines there are.
        limits: Largest sizes.
    """
    sizes = {"prefill": _prefill(limits), "decode": _decode(limits)}
    if layout == "one-engine":
        # TensorRT for RTX stores weights a second time (8-bit ones whole, others in part) for a profile
        # whose dynamic dimensions are not those of the first: what prefill may have several of,
        # decode is built to have two of.
        sizes["decode"] = {
            letter: (low, usual, high if sizes["prefill"][letter][2] == 1 else max(2, high))
            for letter, (low, usual, high) in sizes["decode"].items()
        }
        return [_profile(spec, sizes["prefill"]), _profile(spec, sizes["decode"])]
    return [_profile(spec, sizes[phase])]


def _prefill(limits: EngineLimits) -> _Sizes:
    # One full piece of one prompt is what a prefill step mostly is: rows join one at a time.
    return {
        "B": (1, 1, limits.max_batch_size),
        "S": (1, limits.max_step_tokens, limits.max_step_tokens),
        "L": (1, 1, limits.max_logits),
    }


def _decode(limits: EngineLimits) -> _Sizes:
    return {
        "B": (1, limits.max_batch_size, limits.max_batch_size),
        "S": (1, 1, 1),
        "L": (1, 1, 1),
    }


def _profile(spec: GraphSpec, sizes: _Sizes) -> Profile:
    """Replace the letters of every input's dims by their sizes."""
    ranges = {}
    for tensor in spec.inputs:
        dims = [(dim, dim, dim) if isinstance(dim, int) else sizes[dim] for dim in tensor.dims]
        smallest, usual, largest = zip(*dims, strict=True)
        ranges[tensor.name] = ShapeRange(smallest=smallest, usual=usual, largest=largest)
    return ranges

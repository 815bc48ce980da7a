"""What of an engine is bound to which memory: names, shapes, dtypes and addresses, without a GPU."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gemma_deploy.engine_build import LOGITS_SUM, TOP_INDICES, TOP_LOGITS
from gemma_deploy.errors import EngineError, SessionError
from gemma_deploy.graph_spec import LOGITS, GraphSpec, TensorSpec
from gemma_deploy.runtime.cache_buffers import CacheBuffers, Shape
from gemma_deploy.tensorrt.tensors import ALIGNMENT_BYTES, DTYPE_NAMES

PICKED: Final = (TOP_LOGITS, TOP_INDICES, LOGITS_SUM)
"""The outputs that cross to the host at every step."""

_BYTES: Final[Mapping[str, int]] = {"int64": 8, "int32": 4, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTensor:
    """An input or output as the engine itself states it.

    Attributes:
        name: Its name.
        is_input: Whether it is an input.
        dtype: TensorRT's name of its element type, such as `HALF`.
        shape: One number per axis, -1 where it is dynamic.
    """

    name: str
    is_input: bool
    dtype: str
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Where a tensor of a step is in a block of memory.

    Attributes:
        offset: Of its first byte.
        dtype: Its element type, by numpy's name.
        shape: Its shape in this step.
    """

    offset: int
    dtype: str
    shape: Shape

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A tensor's memory in a step.

    Attributes:
        name: The tensor.
        address: On the device.
        shape: What an input's shape is set to; None for an output, whose shape follows.
    """

    name: str
    address: int
    shape: Shape | None


def check_tensors(spec: GraphSpec, tensors: Iterable[EngineTensor], remedy: str) -> None:
    """Refuse an engine whose tensors are not those that will be bound.

    Args:
        spec: What is expected.
        tensors: What the engine has.
        remedy: What the error tells the user to do.

    Raises:
        EngineError: Another name, direction, dtype or shape.
    """
    found = {tensor.name: tensor for tensor in tensors}
    expected = {tensor.name: (tensor, True) for tensor in spec.inputs}
    expected |= {tensor.name: (tensor, False) for tensor in spec.outputs}
    if found.keys() != expected.keys():
        odd = ", ".join(sorted(found.keys() ^ expected.keys()))
        raise EngineError(
            f"the engine's inputs and outputs are not those its manifest describes; they differ in "
            f"{odd}: {remedy}"
        )
    for name, (tensor, is_input) in expected.items():
        wanted = EngineTensor(
            name=name,
            is_input=is_input,
            dtype=DTYPE_NAMES[tensor.dtype],
            shape=tuple(dim if isinstance(dim, int) else -1 for dim in tensor.dims),
        )
        if not _agree(found[name], wanted):
            raise EngineError(
                f"the engine has {_described(found[name])}, expected {_described(wanted)}: {remedy}"
            )


def pack(specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> tuple[dict[str, Region], int]:
    """Lay tensors out one after the other, so that one copy moves them all.

    Args:
        specs: The tensors.
        sizes: What the letters of their dims stand for.

    Returns:
        Where each is, and how many bytes they take together.
    """
    regions, end = {}, 0
    for spec in specs:
        shape = tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.dims)
        offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        regions[spec.name] = Region(offset=offset, dtype=spec.dtype, shape=shape)
        end = offset + regions[spec.name].size_bytes
    return regions, end


def token_inputs(spec: GraphSpec) -> tuple[TensorSpec, ...]:
    """Return the inputs that come from the host at every step."""
    caches = {tensor.name for tensor in spec.cache_inputs}
    return tuple(tensor for tensor in spec.inputs if tensor.name not in caches)


def picked_outputs(spec: GraphSpec) -> tuple[TensorSpec, ...]:
    """Return the outputs that cross to the host at every step."""
    return tuple(tensor for tensor in spec.outputs if tensor.name in PICKED)


def logits_output(spec: GraphSpec) -> TensorSpec:
    """Return the output that holds all logits."""
    return next(tensor for tensor in spec.outputs if tensor.name == LOGITS)


def cache_bindings(spec: GraphSpec, cache: CacheBuffers) -> list[Binding]:
    """Return the bindings of the KV cache: every `present.*` at the address of its `past_*`.

    Raises:
        SessionError: Rows that do not begin where TensorRT can read them.
    """
    bindings = []
    for tensor, present in zip(cache.tensors, spec.cache_outputs, strict=True):
        if tensor.address % ALIGNMENT_BYTES:
            raise SessionError(
                f"the rows of {tensor.name} begin at address {tensor.address:#x}, which is no multiple "
                f"of {ALIGNMENT_BYTES}: TensorRT cannot take them one by one. Build the engine with a "
                f"--max-seq-len that is a multiple of {ALIGNMENT_BYTES}"
            )
        bindings.append(Binding(name=tensor.name, address=tensor.address, shape=tensor.shape))
        bindings.append(Binding(name=present.name, address=tensor.address, shape=None))
    return bindings


def block_bindings(
    regions: Mapping[str, Region], address: int, *, are_inputs: bool
) -> list[Binding]:
    """Return the bindings of tensors that were laid out in a block at an address."""
    return [
        Binding(
            name=name,
            address=address + region.offset,
            shape=region.shape if are_inputs else None,
        )
        for name, region in regions.items()
    ]


def _agree(found: EngineTensor, wanted: EngineTensor) -> bool:
    """Tell whether a tensor is as wanted; an engine may know more of an output's shape."""
    return (
        (found.is_input, found.dtype) == (wanted.is_input, wanted.dtype)
        and len(found.shape) == len(wanted.shape)
        and all(dim in {actual, -1} for actual, dim in zip(found.shape, wanted.shape, strict=True))
    )


def _described(tensor: EngineTensor) -> str:
    kind = "input" if tensor.is_input else "output"
    return f"the {kind} {tensor.name} {tensor.dtype} {list(tensor.shape)}"

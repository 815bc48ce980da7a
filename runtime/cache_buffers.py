"""KV cache memory by address, for backends that bind it in place."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from gemma_deploy.errors import SessionError
from gemma_deploy.graph_spec import CACHE_DTYPE_BYTES, CacheDType, TensorSpec

Shape = tuple[int, ...]
Allocate = Callable[[Shape, CacheDType], tuple[int, object]]
"""Gives zeroed memory: its address, and the object that keeps it alive."""


@dataclass(frozen=True, slots=True, eq=False)
class CacheTensor:
    """Key or value cache of one layer: [B, K, T, H], contiguous.

    Attributes:
        name: Name of the graph input it is for.
        dtype: Element type, by name: numpy by itself has no bfloat16.
        shape: (B, K, T, H).
        address: Of the first element, on whatever device the memory is.
        owner: Keeps the memory alive.
    """

    name: str
    dtype: CacheDType
    shape: Shape
    address: int
    owner: object

    def rows(self, start: int, stop: int) -> "CacheTensor":
        """Return rows start, ..., stop - 1, in the same memory."""
        row_bytes = math.prod(self.shape[1:]) * CACHE_DTYPE_BYTES[self.dtype]
        return dataclasses.replace(
            self, shape=(stop - start, *self.shape[1:]), address=self.address + start * row_bytes
        )


@dataclass(frozen=True, slots=True, eq=False)
class CacheBuffers:
    """The cache tensors of every layer, key and value in turn.

    Attributes:
        batch_size: B.
        max_seq_len: T.
        tensors: In the order of the graph's cache inputs.
    """

    batch_size: int
    max_seq_len: int
    tensors: tuple[CacheTensor, ...]

    @classmethod
    def allocate(
        cls,
        specs: tuple[TensorSpec, ...],
        batch_size: int,
        max_seq_len: int,
        allocate: Allocate,
        *,
        remedy: str = "use a smaller max_seq_len or batch size",
    ) -> "CacheBuffers":
        """Allocate zeroed tensors.

        Zeroed, because a masked position still meets a zero weight, and zero times the NaN that
        fresh memory may hold is NaN.

        Args:
            specs: The graph's cache inputs, dims ("B", K, "T", H).
            batch_size: B.
            max_seq_len: T.
            allocate: Gives memory on the device.
            remedy: What the error tells the user to do.

        Raises:
            SessionError: There is not enough memory.
        """
        sizes = {"B": batch_size, "T": max_seq_len}
        try:
            tensors = tuple(_allocate_all(specs, sizes, allocate))
        except MemoryError as err:
            raise SessionError(
                f"not enough memory for a KV cache of {batch_size} rows of {max_seq_len:,} tokens: "
                f"{remedy}"
            ) from err
        return cls(batch_size, max_seq_len, tensors)

    def rows(self, start: int, stop: int) -> "CacheBuffers":
        """Return rows start, ..., stop - 1, in the same memory."""
        tensors = tuple(tensor.rows(start, stop) for tensor in self.tensors)
        return CacheBuffers(stop - start, self.max_seq_len, tensors)


def _allocate_all(
    specs: tuple[TensorSpec, ...], sizes: dict[str, int], allocate: Allocate
) -> Iterator[CacheTensor]:
    for spec in specs:
        shape = tuple(dim if isinstance(dim, int) else sizes[dim] for dim in spec.dims)
        dtype = cast(CacheDType, spec.dtype)
        address, owner = allocate(shape, dtype)
        yield CacheTensor(name=spec.name, dtype=dtype, shape=shape, address=address, owner=owner)

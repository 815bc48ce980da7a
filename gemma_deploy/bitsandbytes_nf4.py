"""Matrices that bitsandbytes quantized to NF4, as transformers saves them: `Nf4Matrix`.

Beside NAME (U8 [N*K/2, 1], codes, the first of two in the high nibble) lie NAME.absmax (one scale for
each block of codes), NAME.quant_map (the sixteen values), and NAME.quant_state.bitsandbytes__nf4: JSON
as bytes. With "double quantization" absmax are codes themselves: NAME.nested_quant_map[absmax] *
NAME.nested_absmax of their block + nested_offset.
Source: bitsandbytes' QuantState (https://github.com/bitsandbytes-foundation/bitsandbytes).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gemma_deploy.errors import CheckpointError

if TYPE_CHECKING:
    from gemma_deploy.checkpoint import TensorInfo

STATE_SUFFIX: Final = ".quant_state.bitsandbytes__nf4"

_NUMPY_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F32": np.dtype(np.float32),
    "U8": np.dtype(np.uint8),
}
_NUM_VALUES = 16

Read = Callable[["TensorInfo", int, int], bytes]
"""(tensor, first byte, byte after the last) -> those bytes of it."""
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedScales:
    """What scales mean that were quantized themselves.

    Attributes:
        quant_map: The value of each of 256 codes.
        absmax: One scale for each block of scales.
        block_size: Scales of a block.
        offset: What is added to each.
    """

    quant_map: "TensorInfo"
    absmax: "TensorInfo"
    block_size: int
    offset: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Matrix:
    """Where the parts of one NF4 matrix [N, K] are stored.

    Attributes:
        shape: (N, K).
        block_size: Codes of a block; blocks follow each other through the rows.
        codes: N*K/2 bytes.
        quant_map: The value of each code.
        absmax: One scale for each block, float32, or codes where `nested` is there.
        nested: What the scales' codes mean.
    """

    shape: tuple[int, int]
    block_size: int
    codes: "TensorInfo"
    quant_map: "TensorInfo"
    absmax: "TensorInfo"
    nested: NestedScales | None

    def rows(self, start: int, stop: int, read: Read) -> Floats:
        """Return what rows [start, stop) stand for, float32 [stop - start, K].

        Args:
            start: First row.
            stop: Row after the last.
            read: Reads parts.
        """
        width = self.shape[1]
        first, last = start * width, stop * width
        packed = np.frombuffer(read(self.codes, first // 2, last // 2), np.uint8)
        values = _floats(self.quant_map, read)
        both = np.arange(256)
        pairs = np.stack((values[both >> 4], values[both & 0xF]), axis=-1)  # of each byte
        weights = pairs[packed].reshape(-1)
        first_block = first // self.block_size
        scales = self._scales(first_block, -(-last // self.block_size), read)
        skipped = first - first_block * self.block_size
        weights *= np.repeat(scales, self.block_size)[skipped : skipped + len(weights)]
        return weights.reshape(-1, width)

    def _scales(self, start: int, stop: int, read: Read) -> Floats:
        """Return the scales of blocks [start, stop), float32."""
        item_bytes = _NUMPY_DTYPES[self.absmax.dtype].itemsize
        raw = read(self.absmax, start * item_bytes, stop * item_bytes)
        stored = np.frombuffer(raw, _NUMPY_DTYPES[self.absmax.dtype])
        if self.nested is None:
            return stored.astype(np.float32)
        nested = self.nested
        outer = _floats(nested.absmax, read)[np.arange(start, stop) // nested.block_size]
        scales: Floats = _floats(nested.quant_map, read)[stored] * outer
        return scales + np.float32(nested.offset)


def nf4_matrix(
    name: str, shape: tuple[int, ...], found: Mapping[str, "TensorInfo"], read: Read
) -> Nf4Matrix:
    """Return the NF4 matrix of a name, its parts checked against each other.

    Args:
        name: Canonical name of the matrix.
        shape: What the config calls for.
        found: Every tensor of the checkpoint, as stored.
        read: Reads parts.

    Raises:
        CheckpointError: Parts are missing, or contradict each other or the shape.
    """
    state = _state(found[name + STATE_SUFFIX], read)
    try:
        block_size, stored_shape = int(state["blocksize"]), tuple(map(int, state["shape"]))
        nested = None
        if "nested_blocksize" in state:
            nested = NestedScales(
                quant_map=found[f"{name}.nested_quant_map"],
                absmax=found[f"{name}.nested_absmax"],
                block_size=int(state["nested_blocksize"]),
                offset=float(state["nested_offset"]),
            )
        parts = found[name], found[f"{name}.quant_map"], found[f"{name}.absmax"]
    except (KeyError, TypeError, ValueError, OverflowError) as err:
        raise CheckpointError(
            f"{name} in {found[name].file} is NF4 of bitsandbytes, and lacks {err}: expected its "
            "absmax, quant_map and quant_state beside it. Save the checkpoint again"
        ) from err
    smallest = min(block_size, block_size if nested is None else nested.block_size)
    if stored_shape != shape or len(shape) != 2 or shape[1] % 2 or smallest < 1:
        raise CheckpointError(
            f"{name} in {found[name].file} is NF4 of shape {list(stored_shape)} in blocks of "
            f"{smallest}, expected {list(shape)} by config.json: they belong to different models"
        )
    matrix = Nf4Matrix(
        shape=(shape[0], shape[1]),
        block_size=block_size,
        codes=parts[0],
        quant_map=parts[1],
        absmax=parts[2],
        nested=nested,
    )
    _check_sizes(name, matrix)
    return matrix


def _check_sizes(name: str, matrix: Nf4Matrix) -> None:
    """Require of every part the dtype and length that the others call for."""
    num_blocks = -(-math.prod(matrix.shape) // matrix.block_size)
    nested = matrix.nested
    # The dtype of codes is that of bnb_4bit_quant_storage, and says nothing: they are bytes.
    codes = dataclasses.replace(matrix.codes, dtype="U8")
    expected: list[tuple[TensorInfo, str, int]] = [
        (codes, "U8", math.prod(matrix.shape) // 2),
        (matrix.quant_map, "F32", _NUM_VALUES),
        (matrix.absmax, "F32" if nested is None else "U8", num_blocks),
    ]
    if nested is not None:
        expected += [
            (nested.quant_map, "F32", 256),
            (nested.absmax, "F32", -(-num_blocks // max(nested.block_size, 1))),
        ]
    for part, dtype, length in expected:
        expected_bytes = length * _NUMPY_DTYPES[dtype].itemsize
        if part.dtype != dtype or part.size_bytes != expected_bytes:
            raise CheckpointError(
                f"{part.name} in {part.file} is {part.dtype} of {part.size_bytes} bytes, expected "
                f"{dtype} of {expected_bytes} bytes for {name} {list(matrix.shape)} in NF4: the file "
                "is corrupt, download it again"
            )


def _state(info: "TensorInfo", read: Read) -> Mapping[str, Any]:
    try:
        state = json.loads(read(info, 0, info.size_bytes))
        scheme = state["quant_type"]
    except (ValueError, KeyError, TypeError) as err:
        raise CheckpointError(
            f"{info.name} in {info.file} cannot be read: {err!r}. Expected JSON as bytes, as "
            "bitsandbytes writes it; save the checkpoint again"
        ) from err
    if scheme != "nf4":
        raise CheckpointError(
            f"{info.name} in {info.file} says quant_type {scheme!r}; of bitsandbytes' types only "
            "nf4 is read: use the original float checkpoint"
        )
    return dict(state)


def _floats(info: "TensorInfo", read: Read) -> Floats:
    return np.frombuffer(read(info, 0, info.size_bytes), np.float32)

"""Matrices that bitsandbytes quantized to NF4, as transformers saves them: `Nf4Matrix`.

Beside NAME (U8 [N*K/2, 1], codes, the first of two in the high nibble) lie NAME.absmax (one scale for
each block of codes), NAME.quant_map (the sixteen values), and NAME.quant_state.bitsandbytes__nf4: JSON
as bytes. With "double quantization" absmax are codes themselves: NAME.nested_quant_map[absmax] *
NAME.nested_absmax of their block + nested_offset. Scales and maps are float32, and bfloat16 or float16
where the model has run before it was saved: on a CPU bitsandbytes rounds scales to bfloat16.
Source: bitsandbytes' QuantState (https://github.com/bitsandbytes-foundation/bitsandbytes).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gemma_deploy.errors import CheckpointError
from gemma_deploy.json_files import parse_json
from gemma_deploy.json_values import typed, whole
from gemma_deploy.limits import MAX_CONFIG_BYTES
from gemma_deploy.quoting import shortened
from gemma_deploy.stored_tensor import FLOAT_BYTES, Floats, StoredTensor, widened

STATE_SUFFIX: Final = ".quant_state.bitsandbytes__nf4"
PART_NAMES: Final = frozenset(
    {"absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_SUFFIX[1:]}
)
"""What the parts of a matrix are called beside its own name."""

_NUM_VALUES = 16
_NUM_NESTED_VALUES = 256
_MAX_BLOCK_SIZE = 4096  # the largest that bitsandbytes has


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedScales:
    """What scales mean that were quantized themselves.

    Attributes:
        quant_map: The value of each of 256 codes.
        absmax: One scale for each block of scales.
        block_size: Scales of a block.
        offset: What is added to each.
    """

    quant_map: StoredTensor
    absmax: StoredTensor
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
        absmax: One scale for each block, or its code where `nested` is there.
        nested: What the scales' codes mean.
    """

    shape: tuple[int, int]
    block_size: int
    codes: StoredTensor
    quant_map: StoredTensor
    absmax: StoredTensor
    nested: NestedScales | None

    def rows(self, start: int, stop: int) -> Floats:
        """Return what rows [start, stop) stand for, float32 [stop - start, K].

        Raises:
            CheckpointError: A part cannot be read.
        """
        width = self.shape[1]
        first, last = start * width, stop * width
        packed = np.frombuffer(self.codes.read(first // 2, last // 2), np.uint8)
        values = _floats(self.quant_map)
        both = np.arange(256)
        pairs = np.stack((values[both >> 4], values[both & 0xF]), axis=-1)  # of each byte
        weights = pairs[packed].reshape(-1)
        first_block = first // self.block_size
        scales = self._scales(first_block, -(-last // self.block_size))
        skipped = first - first_block * self.block_size
        weights *= np.repeat(scales, self.block_size)[skipped : skipped + len(weights)]
        return weights.reshape(-1, width)

    def _scales(self, start: int, stop: int) -> Floats:
        """Return the scales of blocks [start, stop), float32."""
        if self.nested is None:
            return _floats(self.absmax, start, stop)
        codes = np.frombuffer(self.absmax.read(start, stop), np.uint8)
        nested = self.nested
        outer = _floats(nested.absmax)[np.arange(start, stop) // nested.block_size]
        scales: Floats = _floats(nested.quant_map)[codes] * outer
        return scales + np.float32(nested.offset)


def nf4_matrix(name: str, shape: tuple[int, ...], found: Mapping[str, StoredTensor]) -> Nf4Matrix:
    """Return the NF4 matrix of a name, its parts checked against each other.

    Args:
        name: Canonical name of the matrix.
        shape: What the config calls for.
        found: Every tensor of the checkpoint, as stored.

    Raises:
        CheckpointError: Parts are missing, or contradict each other or the shape.
    """
    state = _State(found[name + STATE_SUFFIX])
    block_size = state.block_size("blocksize")
    if state.shape() != shape or len(shape) != 2 or shape[1] % 2:
        raise CheckpointError(
            f"{name} in {found[name].file} is NF4 of shape {shortened(list(state.shape()))}, "
            f"expected {list(shape)} by config.json: they belong to different models"
        )
    nested = None
    if state.is_nested:
        nested = NestedScales(
            quant_map=_part(name, "nested_quant_map", found),
            absmax=_part(name, "nested_absmax", found),
            block_size=state.block_size("nested_blocksize"),
            offset=state.offset(),
        )
    matrix = Nf4Matrix(
        shape=(shape[0], shape[1]),
        block_size=block_size,
        codes=found[name],
        quant_map=_part(name, "quant_map", found),
        absmax=_part(name, "absmax", found),
        nested=nested,
    )
    _check_sizes(name, matrix)
    return matrix


def _part(name: str, part: str, found: Mapping[str, StoredTensor]) -> StoredTensor:
    info = found.get(f"{name}.{part}")
    if info is None:
        raise CheckpointError(
            f"{name} in {found[name].file} is NF4 of bitsandbytes, and lacks {name}.{part}: expected "
            "its absmax, quant_map and quant_state beside it. Save the checkpoint again"
        )
    return info


def _check_sizes(name: str, matrix: Nf4Matrix) -> None:
    """Require of every part the dtype and length that the others call for."""
    num_blocks = -(-math.prod(matrix.shape) // matrix.block_size)
    nested = matrix.nested
    # The dtype of codes is that of bnb_4bit_quant_storage, and says nothing: they are bytes.
    codes = dataclasses.replace(matrix.codes, dtype="U8")
    floats, bytes_ = tuple(FLOAT_BYTES), ("U8",)
    expected: list[tuple[StoredTensor, tuple[str, ...], int]] = [
        (codes, bytes_, math.prod(matrix.shape) // 2),
        (matrix.quant_map, floats, _NUM_VALUES),
        (matrix.absmax, floats if nested is None else bytes_, num_blocks),
    ]
    if nested is not None:
        expected += [
            (nested.quant_map, floats, _NUM_NESTED_VALUES),
            (nested.absmax, floats, -(-num_blocks // nested.block_size)),
        ]
    for part, dtypes, length in expected:
        if part.dtype not in dtypes:
            raise CheckpointError(
                f"{part.name} in {part.file} is {part.dtype}, expected {' or '.join(dtypes)} of "
                f"{name} in NF4: bitsandbytes writes nothing else that is read here. Use the original "
                "float checkpoint"
            )
        expected_bytes = length * FLOAT_BYTES.get(part.dtype, 1)
        if part.size_bytes != expected_bytes:
            raise CheckpointError(
                f"{part.name} in {part.file} is {part.dtype} of {part.size_bytes} bytes, expected "
                f"{expected_bytes} bytes for {name} {list(matrix.shape)} in NF4: the file is "
                "corrupt, download it again"
            )


class _State:
    """What bitsandbytes wrote about a matrix; every entry is checked when it is asked for."""

    def __init__(self, info: StoredTensor) -> None:
        self._info = info
        if info.size_bytes > MAX_CONFIG_BYTES:
            raise self._error(f"it has {info.size_bytes} bytes")
        self._raw = parse_json(
            info.read(0, info.size_bytes),
            f"{info.name} in {info.file}",
            error=CheckpointError,
            remedy="save the checkpoint again",
        )
        scheme = self._entry("quant_type")
        if scheme != "nf4":
            raise CheckpointError(
                f"{info.name} in {info.file} says quant_type {shortened(scheme)}; of bitsandbytes' types "
                "only nf4 is read: use the original float checkpoint"
            )

    @property
    def is_nested(self) -> bool:
        """Whether the scales are quantized themselves."""
        return "nested_blocksize" in self._raw

    def block_size(self, name: str) -> int:
        """Return a number of elements that share a scale."""
        try:
            return whole(self._entry(name), name, 1, _MAX_BLOCK_SIZE)
        except ValueError as err:
            raise self._error(str(err)) from err

    def shape(self) -> tuple[int, ...]:
        """Return the matrix's shape."""
        shape: tuple[int, ...] = self._typed(tuple[int, ...], "shape")
        return shape

    def offset(self) -> float:
        """Return what is added to scales that were quantized themselves."""
        offset = float(self._typed(float, "nested_offset"))
        if abs(offset) > float(np.finfo(np.float32).max):
            raise self._error(f"nested_offset is {offset}, expected a number of float32")
        return offset

    def _typed(self, kind: Any, name: str) -> Any:
        try:
            return typed(kind, self._entry(name), name)
        except ValueError as err:
            raise self._error(str(err)) from err

    def _entry(self, name: str) -> object:
        if name not in self._raw:
            raise self._error(f"it lacks {name}")
        return self._raw[name]

    def _error(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self._info.name} in {self._info.file} cannot be used: {found}. Expected JSON as bytes, "
            "as bitsandbytes writes it; save the checkpoint again"
        )


def _floats(info: StoredTensor, start: int = 0, stop: int | None = None) -> Floats:
    """Return elements [start, stop) of a tensor of floats, or all of it, as float32."""
    size = FLOAT_BYTES[info.dtype]
    end = info.size_bytes if stop is None else stop * size
    return widened(info.read(start * size, end), info.dtype)

"""How one matrix of a bundle is stored: `WeightFormat`, and the tensors it takes in the weights file.

A dense matrix is one tensor. A quantized one is two: codes under the matrix's own name, and float16
scales beside them.

| scheme | codes | value |
|---|---|---|
| int4 | U8 [N, K/2], two's complement -8..7, the even element in the low nibble (ONNX's INT4) | code * scale |
| int8 | I8 [N, K], -127..127 | code * scale |
| nf4 | U8 [N, K/2], the even element in the high nibble (bitsandbytes' packing) | table[code] * scale |
| fp8 | F8_E4M3 [N, K] | code * scale |

N and K are a matrix's out and in sizes; scales are [N, K / block_size], or [N, 1] for one per row.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, TypeGuard, cast, get_args

from gemma_deploy.errors import RequestError
from gemma_deploy.graph_spec import DTYPE_BYTES, DType

Scheme = Literal["int4", "int8", "nf4", "fp8"]
StoredDType = Literal["F32", "F16", "BF16", "U8", "I8", "F8_E4M3"]
"""Element types of the weights file, as safetensors spells them."""

SCHEMES: Final[tuple[Scheme, ...]] = get_args(Scheme)
BLOCK_SIZES: Final = (32, 64, 128, 256)
PER_CHANNEL: Final = "channel"
DEFAULT_BLOCK_SIZES: Final[Mapping[str, int | None]] = MappingProxyType(
    {"int4": 32, "int8": 32, "nf4": 64, "fp8": None}
)

STORED_BYTES: Final[Mapping[StoredDType, int]] = MappingProxyType(
    {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1}
)
_STORED_NAMES: Final[Mapping[DType, StoredDType]] = MappingProxyType(
    {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
)
_CODES: Final[Mapping[Scheme, StoredDType]] = MappingProxyType(
    {"int4": "U8", "int8": "I8", "nf4": "U8", "fp8": "F8_E4M3"}
)
_BITS: Final[Mapping[Scheme, int]] = MappingProxyType({"int4": 4, "int8": 8, "nf4": 4, "fp8": 8})
# Blocks are what makes four bits enough; one scale for a whole row of them is of no use.
_PER_CHANNEL_SCHEMES: Final = ("int8", "fp8")


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One tensor of the weights file.

    Attributes:
        name: Its name there.
        dtype: Its element type.
        shape: Its shape; of packed codes, in bytes.
    """

    name: str
    dtype: StoredDType
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * STORED_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How one matrix is stored.

    Attributes:
        scheme: A float dtype, or how it is quantized.
        block_size: Elements of a row that share a scale; None for one scale per row, and in dense
            formats.

    Raises:
        RequestError: On construction: no such scheme, or a block size that it does not have.
    """

    scheme: DType | Scheme
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.scheme not in (*SCHEMES, *DTYPE_BYTES):
            raise RequestError(
                f"there is no weight format {self.scheme!r}; expected one of "
                f"{', '.join((*SCHEMES, *DTYPE_BYTES))}"
            )
        allowed: tuple[int | None, ...] = BLOCK_SIZES if is_scheme(self.scheme) else (None,)
        if self.scheme in _PER_CHANNEL_SCHEMES:
            allowed = (*allowed, None)
        if self.block_size not in allowed:
            sizes = ", ".join(PER_CHANNEL if size is None else str(size) for size in allowed)
            raise RequestError(
                f"{self.scheme} with a block size of {self.block_size or PER_CHANNEL}; expected "
                f"{sizes if is_scheme(self.scheme) else 'none'}"
            )

    def __str__(self) -> str:
        """Return e.g. `int4/64`, `int8/channel`, `float16`; `parse` reads it back."""
        return (
            f"{self.scheme}/{self.block_size or PER_CHANNEL}" if self.is_quantized else self.scheme
        )

    @classmethod
    def parse(cls, text: str) -> "WeightFormat":
        """Return the format that `str` gave.

        Raises:
            RequestError: It is none.
        """
        scheme, slash, block = text.partition("/")
        if block in ("", PER_CHANNEL):
            size = None
        elif block.isascii() and block.isdigit():
            size = int(block)
        else:
            raise RequestError(
                f"{text!r} is no weight format; expected e.g. int4/64 or int8/channel"
            )
        if slash and not is_scheme(scheme):
            raise RequestError(
                f"{text!r} is no weight format: only {', '.join(SCHEMES)} have blocks"
            )
        return cls(scheme, size)  # type: ignore[arg-type]  # checked on construction

    @property
    def is_quantized(self) -> bool:
        """Whether there are scales."""
        return is_scheme(self.scheme)

    @property
    def bits(self) -> int:
        """Bits of one code, or of one dense element; scales come on top."""
        if is_scheme(self.scheme):
            return _BITS[self.scheme]
        return 8 * DTYPE_BYTES[cast(DType, self.scheme)]

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[StoredPart, ...]:
        """Return the tensors that a matrix [N, K] takes; a dense tensor may have any shape.

        Raises:
            RequestError: K is not a multiple of the block size.
        """
        if not is_scheme(self.scheme):
            return (StoredPart(name, _STORED_NAMES[cast(DType, self.scheme)], shape),)
        rows, columns = shape
        block = self.block_size or columns
        if columns % block or (self.bits == 4 and columns % 2):
            fitting = [size for size in BLOCK_SIZES if columns % size == 0]
            remedy = f"choose {' or '.join(map(str, fitting))}" if fitting else "keep it in 16 bits"
            raise RequestError(
                f"{name} has rows of {columns} elements, which blocks of {block} do not divide: "
                f"{remedy}"
            )
        codes = StoredPart(name, _CODES[self.scheme], (rows, columns * self.bits // 8))
        return codes, StoredPart(scales_name(name), "F16", (rows, columns // block))

    def size_bytes(self, shape: tuple[int, ...]) -> int:
        """Return what a tensor takes, scales included.

        Raises:
            RequestError: See `parts`.
        """
        return sum(part.size_bytes for part in self.parts("the matrix", shape))


def is_scheme(name: str) -> TypeGuard[Scheme]:
    """Tell whether a scheme quantizes."""
    return name in SCHEMES


def scales_name(name: str) -> str:
    """Return what the scales of a quantized matrix are called."""
    return f"{name}.scales"

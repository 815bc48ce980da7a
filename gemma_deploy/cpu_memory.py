"""The private memory that ONNX Runtime takes of a CPU's machine for a bundle, while it loads and after.

Private is what no file backs (RssAnon): it cannot be given up. The mapped weights file, which other
processes share, is not counted, nor are packed weights that a prepacked cache maps.

ONNX Runtime multiplies with copies of the matrices that are packed for its kernels: int4 and int8
codes, float32 of everything else but nf4, which is made float32 one matrix at a time at every step.
What a matrix is packed from, its original in float32 or its codes with flipped signs, is held beside
the copies only while that matrix is packed. Constants were measured with ONNX Runtime 1.31, glibc and
Python 3.11 (`benchmarks/inspect_memory.py`).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from gemma_deploy.graph_spec import DTYPE_BYTES, DType
from gemma_deploy.quantization.formats import WeightFormat

RUNTIME_BYTES: Final = 48 << 20
"""Python, its packages, a loaded graph without weights, and what their allocators keep."""
# What a loaded tokenizer holds: so much for each token of the vocabulary, whatever form its file has,
# and no more than so many times the file. Reading takes this many times the file more.
_TOKEN_BYTES: Final = 380
_HELD_PER_FILE_BYTE: Final = 11
_READING_PER_FILE_BYTE: Final = 2
_FLOAT32_BYTES: Final = DTYPE_BYTES["float32"]
# What codes bring along per block: scales in float32, packed once more, with sums of the codes. And the
# blocks that rows of one scale are cut into.
_PACKED_BLOCK_BYTES: Final = 12
_ROW_BLOCK: Final = 32
# Of the codes that were packed, what the allocator cannot yet give back: it lies between what is held.
_SCATTERED_CODES: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """What the product with one matrix takes.

    Attributes:
        packed_bytes: The copy that is multiplied with, held as long as the model is.
        original_bytes: What it is packed from, where that is not the mapped weights file; given up
            when it is packed.
        scattered_bytes: What of it takes memory until the whole model is loaded.
        step_bytes: What each step makes of it for the time of the product.
    """

    packed_bytes: int
    original_bytes: int
    scattered_bytes: int = 0
    step_bytes: int = 0

    @classmethod
    def of(
        cls, shape: tuple[int, ...], dtype: DType, weight_format: WeightFormat | None
    ) -> "PackedMatrix":
        """Return what a matrix [out, in] takes.

        Args:
            shape: Its shape.
            dtype: What it is stored in if it is not quantized.
            weight_format: How it is quantized; None if it is not.
        """
        float32_bytes = math.prod(shape) * _FLOAT32_BYTES
        if weight_format is None:
            original_bytes = 0 if dtype == "float32" else float32_bytes
            return cls(packed_bytes=float32_bytes, original_bytes=original_bytes)
        num_blocks = math.prod(shape) // (weight_format.block_size or _ROW_BLOCK)
        match weight_format.scheme:
            case "int4" | "int8":
                codes_bytes = math.prod(shape) * weight_format.bits // 8
                packed_bytes = codes_bytes + num_blocks * _PACKED_BLOCK_BYTES
                return cls(
                    packed_bytes=packed_bytes,
                    original_bytes=codes_bytes,
                    scattered_bytes=round(_SCATTERED_CODES * codes_bytes),
                )
            case "nf4":
                scales_bytes = num_blocks * _FLOAT32_BYTES
                return cls(packed_bytes=scales_bytes, original_bytes=0, step_bytes=float32_bytes)
            case _:
                return cls(packed_bytes=float32_bytes, original_bytes=float32_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuMemory:
    """What a loaded model takes, and what loading it takes at its peak, in bytes.

    Attributes:
        runtime_bytes: Python, its packages and the graph.
        tokenizer_bytes: The tokenizer.
        weights_bytes: The copies that are multiplied with, and the largest that a step makes.
        loading_bytes: Peak while loading.
        prepacked_weights_bytes: As `weights_bytes`, with a prepacked cache that has the model.
        prepacked_loading_bytes: As `loading_bytes`, from such a cache.
        prepacked_writing_bytes: Peak of the load that writes it.
    """

    runtime_bytes: int
    tokenizer_bytes: int
    weights_bytes: int
    loading_bytes: int
    prepacked_weights_bytes: int
    prepacked_loading_bytes: int
    prepacked_writing_bytes: int


def cpu_memory(
    matrices: Iterable[PackedMatrix], *, vocab_size: int, tokenizer_file_bytes: int
) -> CpuMemory:
    """Return what a model takes on a CPU, but for its KV cache and a step's activations.

    Args:
        matrices: All that it multiplies with.
        vocab_size: Tokens of its vocabulary.
        tokenizer_file_bytes: Size of its tokenizer.json; 0 without one.
    """
    known = list(matrices)
    packed_bytes = sum(x.packed_bytes for x in known)
    originals_bytes = sum(x.original_bytes for x in known)
    scattered_bytes = sum(x.scattered_bytes for x in known)
    step_bytes = max(x.step_bytes for x in known)
    largest_packed = max(x.packed_bytes for x in known)
    largest_original = max(x.original_bytes for x in known)
    tokenizer_bytes = min(_TOKEN_BYTES * vocab_size, _HELD_PER_FILE_BYTE * tokenizer_file_bytes)
    loading_bytes = RUNTIME_BYTES + tokenizer_bytes + _READING_PER_FILE_BYTE * tokenizer_file_bytes
    return CpuMemory(
        runtime_bytes=RUNTIME_BYTES,
        tokenizer_bytes=tokenizer_bytes,
        weights_bytes=packed_bytes + step_bytes,
        loading_bytes=loading_bytes + packed_bytes + scattered_bytes + largest_original,
        prepacked_weights_bytes=step_bytes,
        # Each matrix is packed all the same, and given up for the mapped copy.
        prepacked_loading_bytes=loading_bytes + largest_packed,
        # All originals are kept until the packed weights are written; packing holds one more.
        prepacked_writing_bytes=loading_bytes + packed_bytes + originals_bytes + largest_packed,
    )

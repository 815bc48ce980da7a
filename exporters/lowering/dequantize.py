"""Quantized matrices back to floats, in standard ONNX: whole ones, or the rows that were looked up.

Operators: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html (blocks since opset 21).
"""

from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.exporters.lowering.quantized_weight import QuantizedWeight
from gemma_deploy.quantization.codes import NF4_TABLE
from gemma_deploy.quantization.formats import Scheme

_FLOAT = ir.DataType.FLOAT
_NIBBLE_BITS, _NIBBLE_MASK = 4, 0xF
_BYTES: Final = np.arange(256, dtype=np.uint8)

# What each code stands for before it is scaled, by the code's bits.
_VALUES: Final[dict[Scheme, npt.NDArray[np.float32]]] = {
    "int4": np.array([*range(8), *range(-8, 0)], np.float32),
    "int8": _BYTES.view(np.int8).astype(np.float32),
    "nf4": np.array(NF4_TABLE, np.float32),
    "fp8": _BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32),
}


def dequantized(write: NodeWriter, weight: QuantizedWeight, dtype: ir.DataType) -> ir.Value:
    """Write a whole matrix [N, K] in a float dtype: DequantizeLinear; of NF4, lookups in its table.

    DequantizeLinear multiplies in the dtype of its scales, so these are cast, not its result, which
    compilers would no longer see as quantized.
    """
    if weight.format.scheme == "nf4":
        values = _values(write, weight, weight.packed())
        return _scaled(write, weight, values, weight.scales(), [weight.num_rows], dtype)
    if weight.format.block_size is None:
        scales = write.cast(weight.flat_scales(), dtype)
        return write.op("DequantizeLinear", weight.codes(), scales, axis=0)
    scales = write.cast(weight.scales(), dtype)
    return write.op(
        "DequantizeLinear", weight.codes(), scales, axis=1, block_size=weight.format.block_size
    )


def dequantized_rows(
    write: NodeWriter, weight: QuantizedWeight, indices: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """Write the rows of a matrix at indices int64 [...], [..., K]; only they are dequantized."""
    # The tracer knows how many axes there are, if not their sizes.
    leading = [0] * len(indices.shape or ())
    values = _values(write, weight, write.op("Gather", weight.packed(), indices))
    scales = write.op("Gather", weight.scales(), indices)
    return _scaled(write, weight, values, scales, leading, dtype)


def _values(write: NodeWriter, weight: QuantizedWeight, packed: ir.Value) -> ir.Value:
    """[..., bytes of a row] -> float32, each code's value; two codes of a byte on an axis of their own."""
    table = write.op("Constant", value=ir.tensor(_VALUES[weight.format.scheme]))  # type: ignore[index]  # a quantized format's scheme
    if weight.format.bits == 4:
        low = write.op("BitwiseAnd", packed, _byte(write, _NIBBLE_MASK))
        high = write.op("BitShift", packed, _byte(write, _NIBBLE_BITS), direction="RIGHT")
        nibbles = (high, low) if weight.format.scheme == "nf4" else (low, high)
        last = write.int64(-1)
        packed = write.op("Concat", *(write.op("Unsqueeze", x, last) for x in nibbles), axis=-1)
    return write.op("Gather", table, write.op("Cast", packed, to=ir.DataType.INT32.value))


def _scaled(
    write: NodeWriter,
    weight: QuantizedWeight,
    values: ir.Value,
    scales: ir.Value,
    leading: list[int],
    dtype: ir.DataType,
) -> ir.Value:
    """Multiply values by scales [..., blocks] and give them the shape [..., K], in a float dtype."""
    blocks = write.op(
        "Reshape", values, write.int64(*leading, weight.num_blocks, weight.block_size)
    )
    wide = write.op("Unsqueeze", write.op("Cast", scales, to=_FLOAT.value), write.int64(-1))
    rows = write.op(
        "Reshape", write.op("Mul", blocks, wide), write.int64(*leading, weight.num_columns)
    )
    return rows if dtype == _FLOAT else write.op("Cast", rows, to=dtype.value)


def _byte(write: NodeWriter, value: int) -> ir.Value:
    return write.op("Constant", value=ir.tensor(value, dtype=ir.DataType.UINT8))

"""The traced ops over quantized weights, one function per op and way to write it.

`linear` and `looked_up_embedding` are standard ONNX. TensorRT instead takes rows out of the
dequantized table (`dequantized_embedding`): an engine then holds a tied table once, as codes.

ONNX Runtime has kernels that multiply with codes (`onnxruntime_linear`); its products with all other
formats are over dequantized copies, which the package's sessions have made once, when a graph is loaded.
"""

from collections.abc import Sequence
from typing import Final

import onnx_ir as ir

from gemma_deploy.exporters.lowering.dequantize import dequantized, dequantized_rows
from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.exporters.lowering.quantized_weight import QuantizedWeight
from gemma_deploy.exporters.lowering.traced_ops import inputs_of

_CONTRIB = "com.microsoft"
# int8 products of codes and of activations that are rounded to int8, block by block; of 8-bit codes
# the more exact levels are fifty times slower.
_ACCURACY_LEVEL: Final = 4
# What turns two's complement into codes that count from the smallest, which MatMulNBits reads.
_FLIPPED_SIGNS: Final = {4: 0x88, 8: 0x80}
# Of the blocks MatMulNBits takes, those to cut a row into that has one scale; a block is also what
# activations are rounded by.
_ROW_BLOCKS: Final = (32, 16)
_NF4 = 1


def linear(
    write: NodeWriter, node: ir.Node, weight: QuantizedWeight, activations: ir.DataType
) -> Sequence[ir.Value]:
    """Write `LINEAR` as a product with the transposed dequantized weight."""
    transposed = write.op("Transpose", dequantized(write, weight, activations), perm=[1, 0])
    product = write.op("MatMul", inputs_of(node)[0], transposed)
    return [_biased(write, product, node, activations)]


def dequantized_embedding(
    write: NodeWriter, node: ir.Node, weight: QuantizedWeight, activations: ir.DataType
) -> Sequence[ir.Value]:
    """Write `EMBEDDING` as Gather from the dequantized table."""
    return [write.op("Gather", dequantized(write, weight, activations), inputs_of(node)[1])]


def looked_up_embedding(
    write: NodeWriter, node: ir.Node, weight: QuantizedWeight, activations: ir.DataType
) -> Sequence[ir.Value]:
    """Write `EMBEDDING` as Gather from the codes; only the rows that were looked up are dequantized."""
    return [dequantized_rows(write, weight, inputs_of(node)[1], activations)]


def onnxruntime_linear(
    write: NodeWriter, node: ir.Node, weight: QuantizedWeight, activations: ir.DataType
) -> Sequence[ir.Value]:
    """Write `LINEAR` as MatMulNBits or MatMulBnb4, or FusedMatMul where no kernel takes the codes."""
    x = inputs_of(node)[0]
    block_size = _kernel_block(weight)
    if block_size is not None:
        product = _mat_mul_n_bits(write, x, weight, block_size, activations)
    elif weight.format.scheme == "nf4":
        product = _mat_mul_bnb4(write, x, weight, activations)
    else:
        wide = dequantized(write, weight, activations)
        product = write.op("FusedMatMul", x, wide, domain=_CONTRIB, transB=1)
    return [_biased(write, product, node, activations)]


def _kernel_block(weight: QuantizedWeight) -> int | None:
    """Return the block size to give MatMulNBits, None if it cannot multiply with these codes."""
    if weight.format.scheme not in ("int4", "int8"):
        return None
    if weight.format.block_size is not None:
        return weight.format.block_size
    return next((size for size in _ROW_BLOCKS if weight.num_columns % size == 0), None)


def _mat_mul_n_bits(
    write: NodeWriter,
    x: ir.Value,
    weight: QuantizedWeight,
    block_size: int,
    activations: ir.DataType,
) -> ir.Value:
    bits = weight.format.bits
    flipped = write.op("Constant", value=ir.tensor([_FLIPPED_SIGNS[bits]], dtype=ir.DataType.UINT8))
    scales = write.cast(weight.scales(), activations)
    if block_size != weight.block_size:
        count = weight.num_columns // block_size
        scales = write.op("Expand", scales, write.int64(weight.num_rows, count))
    return write.op(
        "MatMulNBits",
        x,
        write.op("BitwiseXor", weight.blocks(block_size), flipped),
        scales,
        domain=_CONTRIB,
        K=weight.num_columns,
        N=weight.num_rows,
        bits=bits,
        block_size=block_size,
        accuracy_level=_ACCURACY_LEVEL,
    )


def _mat_mul_bnb4(
    write: NodeWriter, x: ir.Value, weight: QuantizedWeight, activations: ir.DataType
) -> ir.Value:
    return write.op(
        "MatMulBnb4",
        x,
        weight.flat(),
        write.cast(weight.flat_scales(), activations),
        domain=_CONTRIB,
        K=weight.num_columns,
        N=weight.num_rows,
        block_size=weight.block_size,
        quant_type=_NF4,
    )


def _biased(
    write: NodeWriter, product: ir.Value, node: ir.Node, activations: ir.DataType
) -> ir.Value:
    bias = inputs_of(node)[2:]
    return write.op("Add", product, write.cast(bias[0], activations)) if bias else product

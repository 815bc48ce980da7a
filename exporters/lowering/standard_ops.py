"""Standard ONNX nodes that several lowerings share: products, lookups, caches, masked attention.

What reads traced nodes imports torch; what writes masks, which engines are built with, does not.

Operators: https://onnx.ai/onnx/operators/ (opset 24: TensorScatter, Attention, RotaryEmbedding).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir

from gemma_deploy.exporters.lowering.nodes import NodeWriter

OPSET_VERSION = 24

_INT64 = ir.DataType.INT64
_TRANSPOSED = [0, 2, 1, 3]
"""[B, S, heads, H] <-> [B, heads, S, H]."""


def linear(write: NodeWriter, node: ir.Node, activations: ir.DataType) -> Sequence[ir.Value]:
    """Write `LINEAR` as a product with the transposed weight, which stays [out, in] in its file."""
    from gemma_deploy.exporters.lowering.traced_ops import inputs_of

    x, weight, *bias = inputs_of(node)
    transposed = write.op("Transpose", write.cast(weight, activations), perm=[1, 0])
    product = write.op("MatMul", x, transposed)
    return [write.op("Add", product, write.cast(bias[0], activations)) if bias else product]


def embedding(write: NodeWriter, node: ir.Node, activations: ir.DataType) -> Sequence[ir.Value]:
    """Write `EMBEDDING` as Gather; rows are cast after they were looked up, not the table."""
    from gemma_deploy.exporters.lowering.traced_ops import inputs_of

    weight, indices = inputs_of(node)
    rows = write.op("Gather", weight, indices)
    return [rows if weight.dtype == activations else write.op("Cast", rows, to=activations.value)]


def rotated_and_cached(
    write: NodeWriter, node: ir.Node, activations: ir.DataType
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Write the part of `ATTENTION` before attention itself: RotaryEmbedding and TensorScatter.

    A cache goes from the graph's input into TensorScatter and from there to the graph's output,
    which is the only form that TensorRT updates in place.

    Returns:
        The rotated query [B, S, N, H] and the updated caches [B, K, T, H], all in the cache's dtype.
    """
    from gemma_deploy.exporters.lowering.traced_ops import cache_dtype_of, inputs_of, num_heads_of

    query, key, value, key_cache, value_cache, cos, sin, input_pos = inputs_of(node)
    flat = write.op("Reshape", query, write.int64(0, 0, -1))
    num_heads = num_heads_of(query)
    rotated = write.op("RotaryEmbedding", flat, cos, sin, num_heads=num_heads)
    rotated = write.op("Reshape", rotated, write.int64(0, 0, num_heads, -1))
    key = write.op("RotaryEmbedding", write.op("Transpose", key, perm=_TRANSPOSED), cos, sin)
    value = write.op("Transpose", value, perm=_TRANSPOSED)
    rotated, key, value = cast_all(write, (rotated, key, value), activations, cache_dtype_of(node))
    return (
        rotated,
        write.op("TensorScatter", key_cache, key, input_pos, axis=2),
        write.op("TensorScatter", value_cache, value, input_pos, axis=2),
    )


def cast_all(
    write: NodeWriter, values: Iterable[ir.Value], source: ir.DataType, target: ir.DataType
) -> list[ir.Value]:
    """Return values of one dtype in another: themselves where it is the same."""
    if source == target:
        return list(values)
    return [write.op("Cast", value, to=target.value) for value in values]


def visible(
    write: NodeWriter,
    query: ir.Value,
    key_cache: ir.Value,
    input_pos: ir.Value,
    window: ir.Value | None,
) -> ir.Value:
    """Write which keys each query sees, bool [B, 1, S, T].

    Args:
        write: Where the nodes go.
        query: [B, S, N, H].
        key_cache: [B, K, T, H].
        input_pos: int64 [B].
        window: Keys a query sees, its own included, int64 scalar; None for all.
    """
    zero, one = (write.op("Constant", value_int=x) for x in (0, 1))
    sizes = (
        write.op("Squeeze", write.op("Shape", x, start=axis, end=axis + 1))
        for x, axis in ((query, 1), (key_cache, 2))
    )
    steps, slots = (write.op("Range", zero, size, one) for size in sizes)  # [S], [T]
    first = write.op("Unsqueeze", input_pos, write.int64(1, 2, 3))  # [B, 1, 1, 1]
    positions = write.op("Add", first, write.op("Unsqueeze", steps, write.int64(1)))  # [B, 1, S, 1]
    distance = write.op("Sub", positions, slots)  # [B, 1, S, T]
    seen = write.op("GreaterOrEqual", distance, zero)
    if window is None:
        return seen
    return write.op("And", seen, write.op("Less", distance, window))


def masked_attention(
    write: NodeWriter,
    query: ir.Value,
    key_cache: ir.Value,
    value_cache: ir.Value,
    mask: ir.Value,
    **attributes: Any,
) -> ir.Value:
    """Write Attention over the whole cache with an explicit mask.

    Never with `nonpad_kv_seqlen`, which TensorRT ignores without a word.

    Args:
        write: Where the nodes go.
        query: [B, S, N, H].
        key_cache: [B, K, T, H].
        value_cache: [B, K, T, H].
        mask: bool [B, 1, S, T].
        **attributes: `scale` and `softcap`: numbers, or references to a function's attributes.

    Returns:
        [B, S, N, H].
    """
    query = write.op("Transpose", query, perm=_TRANSPOSED)
    output = write.op("Attention", query, key_cache, value_cache, mask, **attributes)
    return write.op("Transpose", output, perm=_TRANSPOSED)

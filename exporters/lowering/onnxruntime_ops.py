"""The traced ops as ONNX Runtime's own nodes.

Attention is com.microsoft GroupQueryAttention, whose work grows with the valid length of the cache
(the standard op's grows with its capacity) and which updates the cache in place when past and
present are bound to the same memory. Linear layers are com.microsoft FusedMatMul with a transposed
right side: weights stay as the checkpoint has them, [out, in], and ONNX Runtime packs them straight
from the mapped file, without a transposed copy.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from collections.abc import Sequence
from typing import cast

import onnx_ir as ir

from gemma_deploy.exporters.lowering.int8_cache import (
    CONTRIB,
    GROUP_QUERY_ATTENTION,
    CacheLengths,
    int8_attention,
)
from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.exporters.lowering.standard_ops import cast_all
from gemma_deploy.exporters.lowering.traced_ops import (
    attributes_of,
    cache_dtype_of,
    inputs_of,
    num_heads_of,
)

OPSETS = {"": 24, "com.microsoft": 1}


def linear(write: NodeWriter, node: ir.Node, activations: ir.DataType) -> Sequence[ir.Value]:
    """Write `LINEAR` as FusedMatMul.

    Weights that are stored in bfloat16 are cast on the way, since ONNX Runtime's CPU kernels have no
    bfloat16 product.
    """
    x, weight, *bias = inputs_of(node)
    stored = write.cast(weight, activations)
    product = write.op("FusedMatMul", x, stored, domain=CONTRIB, transB=1)
    return [write.op("Add", product, bias[0]) if bias else product]


def attention(write: NodeWriter, node: ir.Node, activations: ir.DataType) -> Sequence[ir.Value]:
    """Write `ATTENTION` as RotaryEmbedding and GroupQueryAttention, this in the cache's dtype.

    Of an int8 cache `node` has the scales as two more inputs, and attention is in float32.

    Every row counts as input_pos + S tokens long, padding included: what padding writes into the
    cache lies beyond the row's true length and is overwritten by its next token.
    """
    query, key, value, key_cache, value_cache, cos, sin, input_pos, *scales = inputs_of(node)
    num_heads, num_kv_heads = num_heads_of(query), num_heads_of(key)
    attributes = attributes_of(node)
    # Of cos, not of query: one value for all layers, so that repeated nodes can be merged.
    tokens = write.op("Shape", cos, start=1, end=2)
    total = write.op("Add", input_pos, tokens)  # [B]
    longest = write.op("ReduceMax", total, keepdims=0)
    lengths = CacheLengths(
        before=input_pos,
        last=write.op("Cast", write.op("Sub", total, write.int64(1)), to=ir.DataType.INT32.value),
        longest=longest,
        longest_int32=write.op("Cast", longest, to=ir.DataType.INT32.value),
    )
    rotated = (
        write.op("RotaryEmbedding", _flat(write, x), cos, sin, num_heads=heads)
        for x, heads in ((query, num_heads), (key, num_kv_heads))
    )
    dtype = ir.DataType.FLOAT if scales else cache_dtype_of(node)
    flat_query, *rows = cast_all(write, [*rotated, _flat(write, value)], activations, dtype)
    flat_query.shape = _flat_shape(query)
    group_query_attention = {
        "num_heads": num_heads,
        "kv_num_heads": num_kv_heads,
        "scale": attributes.scale,
        "softcap": attributes.softcap,
        # Counts the query's own key, as Gemma does; -1 is ONNX Runtime's word for no window.
        "local_window_size": attributes.sliding_window or -1,
    }
    caches = (key_cache, value_cache)
    if scales:
        output, *presents = int8_attention(
            write, flat_query, rows, caches, scales, lengths, **group_query_attention
        )
    else:
        output, *presents = write.ops(
            GROUP_QUERY_ATTENTION,
            flat_query,
            *rows,
            *caches,
            lengths.last,
            lengths.longest_int32,
            num_outputs=3,
            domain=CONTRIB,
            **group_query_attention,
        )
    output.shape = _flat_shape(query)
    output = write.op("Reshape", output, write.int64(0, 0, num_heads, -1))  # [B, S, N, H]
    (output,) = cast_all(write, [output], dtype, activations)
    return output, *presents


def _flat(write: NodeWriter, x: ir.Value) -> ir.Value:
    """[B, S, heads, H] -> [B, S, heads * H]."""
    flat = write.op("Reshape", x, write.int64(0, 0, -1))
    flat.shape = _flat_shape(x)
    return flat


def _flat_shape(x: ir.Value) -> ir.Shape:
    """Return [B, S, heads * H] of a traced [B, S, heads, H]; reshapes that undo others go by it."""
    batch, tokens, heads, head_dim = cast(ir.Shape, x.shape)
    return ir.Shape([batch, tokens, cast(int, heads) * cast(int, head_dim)])

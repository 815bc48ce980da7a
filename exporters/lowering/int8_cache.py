"""Attention over a cache of 8-bit codes, as ONNX Runtime's own nodes: `int8_attention`.

A channel's code is its number over a scale of its own, rounded. Query and keys are multiplied channel by
channel, so that the query takes the keys' scales, and the output those of the values: the kernel itself
needs no scale, and its fastest form, of one scale for all, is exact.

ONNX Runtime's int8 kernel is two to three times as fast as float32's on one token, and three to
five times as slow on a prompt. So an If asks how many tokens there are. For several, the cache is
widened once and the float32 kernel attends to what the codes say: both branches compute the same.

For one token it has two forms. The one it prefers widens the values block by block before it multiplies;
the other, for what the first cannot do (a head's sink, for one), multiplies with the codes as they lie.
So every head gets a sink of minus infinity, which takes nothing from any token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import onnx_ir as ir

from gemma_deploy.exporters.lowering.nodes import NodeWriter

CONTRIB: Final = "com.microsoft"
GROUP_QUERY_ATTENTION: Final = "GroupQueryAttention"

_FLOAT = ir.DataType.FLOAT
_NO_INPUTS = (None,) * 4
"""Between the lengths and the sinks GroupQueryAttention has others, which are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLengths:
    """How far the caches are filled.

    Attributes:
        before: Tokens of each row before the step, int64 [B].
        last: Index of each row's last token, int32 [B].
        longest: Tokens of the longest row after the step, int64 scalar.
        longest_int32: The same in int32.
    """

    before: ir.Value
    last: ir.Value
    longest: ir.Value
    longest_int32: ir.Value


def int8_attention(
    write: NodeWriter,
    query: ir.Value,
    rows: Sequence[ir.Value],
    caches: Sequence[ir.Value],
    scales: Sequence[ir.Value],
    lengths: CacheLengths,
    **attributes: Any,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Write attention to int8 caches and what updates them.

    Args:
        write: Where the nodes go.
        query: float32 [B, S, N * H], rotated; S is 1 where it is known, and a name where it is not.
        rows: The step's keys, rotated, and values, float32 [B, S, K * H] each.
        caches: Keys and values, int8 [B, K, T, H].
        scales: Of keys and values, float32 [K, H].
        lengths: How far the caches are filled.
        **attributes: GroupQueryAttention's, `num_heads` and `kv_num_heads` among them.

    Returns:
        The output, float32 [B, S, N * H], and the updated caches.
    """
    num_heads, num_kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    key_scale, value_scale = scales
    num_tokens = cast(ir.Shape, query.shape)[1]
    query = write.op("Mul", query, _per_head(write, key_scale, num_heads, num_kv_heads))
    divided = [
        write.op("Div", row, write.op("Reshape", scale, write.int64(-1)))
        for row, scale in zip(rows, scales, strict=True)
    ]
    step = _Step(query, divided, caches, lengths, attributes)
    if num_tokens == 1:
        output, keys, values = _of_one_token(write, step)
    else:
        tokens = write.op("Squeeze", write.op("Shape", query, start=1, end=2))
        output, keys, values = write.ops(
            "If",
            write.op("Equal", tokens, write.op("Constant", value_int=1)),
            num_outputs=3,
            then_branch=_branch("one_token", _of_one_token, step),
            else_branch=_branch("several_tokens", _of_several_tokens, step),
        )
    output = write.op("Mul", output, _per_head(write, value_scale, num_heads, num_kv_heads))
    return output, keys, values


@dataclass(frozen=True, slots=True)
class _Step:
    """What both branches read: query and rows are scaled, so that codes stand for themselves."""

    query: ir.Value
    rows: Sequence[ir.Value]
    caches: Sequence[ir.Value]
    lengths: CacheLengths
    attributes: dict[str, Any]


def _of_one_token(write: NodeWriter, step: _Step) -> Sequence[ir.Value]:
    one = write.op("Constant", value_floats=[1.0])
    sinks = write.op("Constant", value_floats=[-math.inf] * step.attributes["num_heads"])
    return write.ops(
        GROUP_QUERY_ATTENTION,
        step.query,
        *step.rows,
        *step.caches,
        step.lengths.last,
        step.lengths.longest_int32,
        *_NO_INPUTS,
        sinks,
        one,
        one,
        num_outputs=3,
        domain=CONTRIB,
        kv_cache_bit_width=8,
        k_quant_type="PER_TENSOR",
        v_quant_type="PER_TENSOR",
        **step.attributes,
    )


def _of_several_tokens(write: NodeWriter, step: _Step) -> Sequence[ir.Value]:
    heads = write.int64(0, 0, step.attributes["kv_num_heads"], -1)
    rounded, presents, widened = [], [], []
    for row, cache in zip(step.rows, step.caches, strict=True):
        codes = write.op(
            "QuantizeLinear",
            row,
            write.number(1.0, _FLOAT),
            write.number(0, ir.DataType.INT8),
        )
        rounded.append(write.op("Cast", codes, to=_FLOAT.value))
        update = write.op("Transpose", write.op("Reshape", codes, heads), perm=[0, 2, 1, 3])
        present = write.op("TensorScatter", cache, update, step.lengths.before, axis=2)
        presents.append(present)
        end = write.op("Unsqueeze", step.lengths.longest, write.int64(0))
        filled = write.op("Slice", present, write.int64(0), end, write.int64(2))
        widened.append(write.op("Cast", filled, to=_FLOAT.value))
    output, *_ = write.ops(
        GROUP_QUERY_ATTENTION,
        step.query,
        *rounded,
        *widened,
        step.lengths.last,
        step.lengths.longest_int32,
        num_outputs=3,
        domain=CONTRIB,
        **step.attributes,
    )
    return output, *presents


def _branch(
    name: str, write_branch: Callable[[NodeWriter, _Step], Sequence[ir.Value]], step: _Step
) -> ir.Graph:
    write = NodeWriter()
    outputs = write_branch(write, step)
    for value, dtype in zip(outputs, (_FLOAT, ir.DataType.INT8, ir.DataType.INT8), strict=True):
        value.dtype = dtype
    return ir.Graph([], outputs, nodes=write.nodes, name=name)


def _per_head(write: NodeWriter, scale: ir.Value, num_heads: int, num_kv_heads: int) -> ir.Value:
    """Write the scales [K, H] as those of the N query heads in turn, [N * H]; folded at load."""
    repeated = write.op(
        "Expand",
        write.op("Unsqueeze", scale, write.int64(1)),
        write.int64(num_kv_heads, num_heads // num_kv_heads, 1),
    )
    return write.op("Reshape", repeated, write.int64(-1))

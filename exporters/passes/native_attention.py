"""Attention by TensorRT's own kernels: `use_native_attention`.

TRT_Attention: https://github.com/onnx/onnx-tensorrt/blob/main/docs/TRT_custom_ops.md. That its causal
mask LOWER_RIGHT with `kv_lengths` is one of each row's own follows from its description; it has not
run on hardware yet.
"""

from typing import Final

import onnx_ir as ir

from gemma_deploy.errors import RequestError
from gemma_deploy.exporters.lowering.gemma_attention import is_gemma_attention
from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.exporters.lowering.standard_ops import visible

OP_TYPE: Final = "TRT_Attention"
DOMAIN: Final = "trt"
CAUSAL_KIND: Final = "lower_right"

_HEADS_FIRST = [0, 2, 1, 3]


def use_native_attention(model: ir.Model, *, leave_special: bool = False) -> None:
    """Replace GemmaAttention nodes by TRT_Attention.

    Scores are scaled beforehand, on the query: the op has no scale. A layer with a sliding window gets
    an explicit mask, whose work grows with the cache's capacity.

    Args:
        model: A TensorRT graph of a bundle; changed.
        leave_special: Whether to leave layers with a softcap or a sliding window as they are.

    Raises:
        RequestError: A layer caps its scores, which TRT_Attention cannot; the model is unchanged.
    """
    chosen = [
        node
        for node in model.graph
        if is_gemma_attention(node)
        and not (leave_special and (_number(node, "softcap") or _number(node, "sliding_window")))
    ]
    capped = sum(1 for node in chosen if _number(node, "softcap"))
    if capped:
        raise RequestError(
            f"{capped} layers cap attention scores (softcap), which TensorRT's own attention cannot: "
            "take --attention auto or plugin"
        )
    for node in chosen:
        write = NodeWriter()
        output = _native(write, node)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], write.nodes, node.outputs, [output]
        )
    if chosen:
        model.graph.opset_imports[DOMAIN] = 1


def _native(write: NodeWriter, node: ir.Node) -> ir.Value:
    query, key_cache, value_cache, input_pos = (value for value in node.inputs if value is not None)
    # Updated caches are outputs of the graph, whose dtypes are stated.
    dtype = key_cache.dtype or ir.DataType.UNDEFINED
    scaled = write.op("Mul", query, write.number(_number(node, "scale"), dtype))
    window = int(_number(node, "sliding_window"))
    if window:
        long_pos = write.op("Cast", input_pos, to=ir.DataType.INT64.value)
        limit = write.op("Constant", value_int=window)
        mask = visible(write, query, key_cache, long_pos, limit)
        optional: list[ir.Value | None] = [mask]
        causal_kind = "none"
    else:
        tokens = write.op("Shape", query, start=1, end=2)
        short = write.op("Cast", tokens, to=ir.DataType.INT32.value)
        optional = [None, None, write.op("Add", input_pos, short)]
        causal_kind = CAUSAL_KIND
    output = write.op(
        OP_TYPE,
        write.op("Transpose", scaled, perm=_HEADS_FIRST),
        key_cache,
        value_cache,
        *optional,
        domain=DOMAIN,
        causal_kind=causal_kind,
    )
    return write.op("Transpose", output, perm=_HEADS_FIRST)


def _number(node: ir.Node, name: str) -> float:
    return float(node.attributes[name].value)

"""The op GemmaAttention of TensorRT graphs: its name, and its meaning as an ONNX function.

A file carries the function, so it is valid ONNX by itself and runs wherever standard ONNX runs. When
an engine is built, passes replace the nodes by native attention or by the plugin.
"""

from typing import Final

import onnx_ir as ir

from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.exporters.lowering.standard_ops import OPSET_VERSION, masked_attention, visible

OP_TYPE: Final = "GemmaAttention"
DOMAIN: Final = "gemma_deploy"

_INT64_MAX = (1 << 63) - 1


def is_gemma_attention(node: ir.Node) -> bool:
    """Tell whether a node is one of this op."""
    return (node.domain, node.op_type) == (DOMAIN, OP_TYPE)


def gemma_attention_function() -> ir.Function:
    """Return the function (query, key_cache, value_cache, input_pos) -> output.

    Inputs are the rotated query [B, S, N, H], the updated caches [B, K, T, H] and input_pos int32 [B],
    each row's number of tokens before this step; the output is [B, S, N, H]. Attributes are those of
    `StaticCacheAttentionAttributes`. Query i of row b sees keys j <= input_pos[b] + i and, with a
    window, only j > input_pos[b] + i - sliding_window.
    """
    write = NodeWriter()
    names = ("query", "key_cache", "value_cache", "input_pos")
    query, key_cache, value_cache, input_pos = inputs = [ir.Value(name=name) for name in names]
    types = {
        "scale": ir.AttributeType.FLOAT,
        "softcap": ir.AttributeType.FLOAT,
        "sliding_window": ir.AttributeType.INT,
    }
    stated = write.op(
        "Constant", value_int=ir.RefAttr("value_int", "sliding_window", types["sliding_window"])
    )
    is_stated = write.op("Cast", stated, to=ir.DataType.BOOL.value)
    unlimited = write.op("Constant", value_int=_INT64_MAX)
    window = write.op("Where", is_stated, stated, unlimited)
    long_pos = write.op("Cast", input_pos, to=ir.DataType.INT64.value)
    output = masked_attention(
        write,
        query,
        key_cache,
        value_cache,
        visible(write, query, key_cache, long_pos, window),
        scale=ir.RefAttr("scale", "scale", types["scale"]),
        softcap=ir.RefAttr("softcap", "softcap", types["softcap"]),
    )
    output.name = "output"
    graph = ir.Graph(
        inputs, [output], nodes=write.nodes, opset_imports={"": OPSET_VERSION}, name=OP_TYPE
    )
    attributes = [ir.Attr(name, kind, None) for name, kind in types.items()]
    return ir.Function(DOMAIN, OP_TYPE, graph=graph, attributes=attributes)

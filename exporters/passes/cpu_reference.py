"""A TensorRT graph made to run on a CPU in float32: `use_cpu_reference`.

What comes out says what the graph means, not how TensorRT computes it: no kernel of TensorRT and no
plugin is involved, and nothing is rounded to 16 bits but the weights.
"""

import onnx_ir as ir

from gemma_deploy.errors import ExportError
from gemma_deploy.exporters.lowering.gemma_attention import (
    gemma_attention_function,
    is_gemma_attention,
)
from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.exporters.passes import native_attention

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOAT = ir.DataType.FLOAT


def use_cpu_reference(model: ir.Model) -> None:
    """Rewrite a graph in standard ops of float32; caches are float32 as well.

    Args:
        model: A TensorRT graph, with whatever attention; changed.

    Raises:
        ExportError: A TRT_Attention node is not of a form that `use_native_attention` writes.
    """
    for node in list(model.graph):
        if (node.domain, node.op_type) == (native_attention.DOMAIN, native_attention.OP_TYPE):
            _expand(model.graph, node)
    model.graph.opset_imports.pop(native_attention.DOMAIN, None)
    if any(is_gemma_attention(node) for node in model.graph):
        function = gemma_attention_function()
        model.functions[function.identifier()] = function
    _widen(model.graph)


def _expand(graph: ir.Graph, node: ir.Node) -> None:
    """Write TRT_Attention's documented meaning as the standard Attention with a mask."""
    query, key, value, mask, query_lengths, kv_lengths = [*node.inputs, None, None, None][:6]
    causal_kind = node.attributes.get_string("causal_kind", "none")
    write = NodeWriter()
    if mask is None and kv_lengths is not None and causal_kind == native_attention.CAUSAL_KIND:
        mask = _lower_right(write, query, key, kv_lengths)
        causal_kind = "none"
    if mask is None or query_lengths is not None or causal_kind != "none":
        raise ExportError(
            f"{node.name} is TRT_Attention with causal_kind {causal_kind!r} and "
            f"{sum(x is not None for x in node.inputs)} inputs; expected a mask, or kv_lengths with "
            f"{native_attention.CAUSAL_KIND!r}"
        )
    output = write.op("Attention", query, key, value, mask, scale=1.0)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], write.nodes, node.outputs, [output]
    )


def _lower_right(
    write: NodeWriter, query: ir.Value | None, key: ir.Value | None, kv_lengths: ir.Value
) -> ir.Value:
    """Write the mask j <= i + kv_length - S, bool [B, 1, S, T], of query [B, N, S, H] and key."""
    zero, one = (write.op("Constant", value_int=x) for x in (0, 1))
    tokens, capacity = (
        write.op("Squeeze", write.op("Shape", x, start=2, end=3)) for x in (query, key)
    )
    queries, keys = (write.op("Range", zero, size, one) for size in (tokens, capacity))
    lengths = write.op("Cast", kv_lengths, to=ir.DataType.INT64.value)
    first = write.op("Sub", write.op("Unsqueeze", lengths, write.int64(1, 2, 3)), tokens)
    last = write.op("Add", first, write.op("Unsqueeze", queries, write.int64(1)))  # [B, 1, S, 1]
    return write.op("LessOrEqual", keys, last)


def _widen(graph: ir.Graph) -> None:
    """Make every value of 16 bits float32; weights keep their bytes and are cast."""
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype in _NARROW:
            value.dtype = _FLOAT
    interface = {*graph.inputs, *graph.outputs}
    for node in list(graph):
        for value in node.outputs:
            if value not in interface:
                value.type = None  # of 16 bits, and inferred anew where it matters
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and target.value in _NARROW:
            node.attributes["to"] = ir.AttrInt64("to", _FLOAT)
        constant = node.attributes.get("value")
        if node.op_type == "Constant" and constant is not None:
            node.attributes["value"] = ir.AttrTensor("value", _widened(constant.value))
    first = graph[0]
    for value in list(graph.initializers.values()):
        if value.dtype not in _NARROW:
            continue
        cast = ir.Node("", "Cast", [value], attributes={"to": ir.AttrInt64("to", _FLOAT)}.values())
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        cast.replace_input_with(0, value)
        graph.insert_before(first, cast)


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype not in _NARROW:
        return tensor
    return ir.tensor(tensor.numpy().astype("float32"), dtype=_FLOAT)

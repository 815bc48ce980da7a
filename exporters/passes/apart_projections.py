"""Keeping the feed-forward's gate and up products apart: `keep_projections_apart`."""

import onnx_ir as ir

from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.memory import group_of

_GROUP = "feed-forward"


def keep_projections_apart(model: ir.Model) -> None:
    """Give feed-forward products that read the same activations inputs that differ for a compiler.

    TensorRT joins products of one input into one product with a joined weight. That is a copy of both
    weights in memory beside the plan: building then takes half as much memory again, for a product
    so large that nothing is gained. Adding zero to the input of all but the first keeps them apart;
    it is computed together with the norm before it.

    Args:
        model: A TensorRT graph of a bundle; changed.
    """
    seen: set[ir.Value] = set()
    for node in list(model.graph):
        if node.op_type != "MatMul" or group_of(_weight_name(node)) != _GROUP:
            continue
        x = node.inputs[0]
        if x is None or x not in seen:
            seen.update([x] if x is not None else [])
            continue
        write = NodeWriter()
        zero = write.op("CastLike", write.op("Constant", value_float=0.0), x)
        apart = write.op("Add", x, zero)
        model.graph.insert_before(node, write.nodes)
        node.replace_input_with(0, apart)


def _weight_name(product: ir.Node) -> str:
    """Return the name of the weight a product multiplies with; empty if it is none."""
    weight = product.inputs[1]
    for op_type in ("Transpose", "DequantizeLinear"):
        producer = None if weight is None else weight.producer()
        if producer is not None and producer.op_type == op_type:
            weight = producer.inputs[0]
    if weight is None or not weight.is_initializer():
        return ""
    return weight.name or ""

"""Replacing the traced ops of a graph by the nodes of a target: `lower`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import onnx_ir as ir

from gemma_deploy.exporters.lowering import (
    onnxruntime_ops,
    portable_ops,
    quantized_ops,
    standard_ops,
    tensorrt_ops,
    traced_ops,
)
from gemma_deploy.exporters.lowering.gemma_attention import gemma_attention_function
from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.exporters.lowering.quantized_weight import QuantizedWeight
from gemma_deploy.exporters.lowering.traced_ops import inputs_of
from gemma_deploy.graph_spec import Lowering

WriteOp = Callable[[NodeWriter, ir.Node, ir.DataType], Sequence[ir.Value]]
"""(where nodes go, the traced node, dtype of activations) -> values that replace its outputs."""
WriteQuantized = Callable[[NodeWriter, ir.Node, QuantizedWeight, ir.DataType], Sequence[ir.Value]]
"""The same for a node with a quantized weight."""

_NOTHING_QUANTIZED: Mapping[ir.Value, QuantizedWeight] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How a lowering writes graphs.

    Attributes:
        ops: Each traced op's name, and what writes it.
        quantized: The same of ops with weights, where these are quantized.
        opsets: Versions of the operator sets that are used.
        functions: Creators of the functions a file carries.
    """

    ops: Mapping[str, WriteOp]
    quantized: Mapping[str, WriteQuantized]
    opsets: Mapping[str, int]
    functions: tuple[Callable[[], ir.Function], ...] = ()


def lower(
    model: ir.Model,
    lowering: Lowering,
    activations: ir.DataType,
    quantized: Mapping[ir.Value, QuantizedWeight] = _NOTHING_QUANTIZED,
) -> None:
    """Replace every traced op of a model by the nodes of a lowering.

    Args:
        model: A traced model whose initializers, and caches among its inputs, have the dtypes they
            are stored in; changed.
        lowering: The target.
        activations: What the graph computes in.
        quantized: Values that stand for quantized weights, no initializers of the graph; what the
            lowering reads in their place becomes such.
    """
    target = TARGETS[lowering]
    for node in list(model.graph):
        if node.domain != traced_ops.DOMAIN:
            continue
        write = NodeWriter()
        weight = next((quantized[x] for x in inputs_of(node) if x in quantized), None)
        if weight is None:
            outputs = target.ops[node.op_type](write, node, activations)
        else:
            outputs = target.quantized[node.op_type](write, node, weight, activations)
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], write.nodes, node.outputs, outputs
        )
    for weight in quantized.values():
        for view in weight.views:
            model.graph.register_initializer(view)
    for create in target.functions:
        function = create()
        model.functions[function.identifier()] = function
    model.graph.opset_imports.clear()
    model.graph.opset_imports.update(target.opsets)


TARGETS: Mapping[Lowering, Target] = MappingProxyType(
    {
        "onnxruntime": Target(
            ops={
                traced_ops.LINEAR: onnxruntime_ops.linear,
                traced_ops.EMBEDDING: standard_ops.embedding,
                traced_ops.ATTENTION: onnxruntime_ops.attention,
            },
            quantized={
                traced_ops.LINEAR: quantized_ops.onnxruntime_linear,
                traced_ops.EMBEDDING: quantized_ops.looked_up_embedding,
            },
            opsets=onnxruntime_ops.OPSETS,
        ),
        "tensorrt": Target(
            ops={
                traced_ops.LINEAR: standard_ops.linear,
                traced_ops.EMBEDDING: standard_ops.embedding,
                traced_ops.ATTENTION: tensorrt_ops.attention,
            },
            quantized={
                traced_ops.LINEAR: quantized_ops.linear,
                traced_ops.EMBEDDING: quantized_ops.dequantized_embedding,
            },
            opsets=tensorrt_ops.OPSETS,
            functions=(gemma_attention_function,),
        ),
        "portable": Target(
            ops={
                traced_ops.LINEAR: standard_ops.linear,
                traced_ops.EMBEDDING: standard_ops.embedding,
                traced_ops.ATTENTION: portable_ops.attention,
            },
            quantized={
                traced_ops.LINEAR: quantized_ops.linear,
                traced_ops.EMBEDDING: quantized_ops.looked_up_embedding,
            },
            opsets=portable_ops.OPSETS,
        ),
    }
)
"""Every lowering, and how it writes graphs."""

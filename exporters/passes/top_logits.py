"""Picking the largest logits inside the graph: `add_top_logits`."""

import onnx_ir as ir

from gemma_deploy.engine_build import LOGITS_SUM, TOP_INDICES, TOP_LOGITS
from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.graph_spec import LOGITS


def add_top_logits(model: ir.Model, num_candidates: int) -> None:
    """Add outputs that spare the host a look at all logits; see `engine.engine_spec`.

    They follow `logits` [B, L, V]: `top_logits` float32 [B, L, k] in descending order, `top_indices`
    int64 [B, L, k], and `logits_sum` float32 [B, L], which is finite only if every logit is.

    Args:
        model: A graph of a bundle; changed.
        num_candidates: k, at most V.
    """
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == LOGITS)
    write = NodeWriter()
    top, indices = write.ops(
        "TopK", logits, write.int64(num_candidates), num_outputs=2, axis=-1, largest=1, sorted=1
    )
    total = write.op("ReduceSum", logits, write.int64(-1), keepdims=0)
    graph.extend(write.nodes)
    if logits.shape is None:
        raise ValueError(f"{LOGITS} has no shape: not a graph of a bundle")
    positions = list(logits.shape[:-1])
    picked = (
        (TOP_LOGITS, top, ir.DataType.FLOAT, [*positions, num_candidates]),
        (TOP_INDICES, indices, ir.DataType.INT64, [*positions, num_candidates]),
        (LOGITS_SUM, total, ir.DataType.FLOAT, positions),
    )
    for place, (name, value, dtype, shape) in enumerate(picked, start=1):
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
        graph.outputs.insert(place, value)

"""The traced ops as TensorRT reads them: RotaryEmbedding, TensorScatter and one GemmaAttention node.

Attention stays one node of our own until an engine is built: only then is it known which layers take
TensorRT's attention and which our plugin. docs/bundle.md describes the node.
"""

from collections.abc import Sequence
from dataclasses import asdict

import onnx_ir as ir

from gemma_deploy.exporters.lowering import gemma_attention
from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.exporters.lowering.standard_ops import OPSET_VERSION, rotated_and_cached
from gemma_deploy.exporters.lowering.traced_ops import attributes_of, inputs_of

OPSETS = {"": OPSET_VERSION, gemma_attention.DOMAIN: 1}


def attention(write: NodeWriter, node: ir.Node, activations: ir.DataType) -> Sequence[ir.Value]:
    """Write `ATTENTION` as RotaryEmbedding, TensorScatter and GemmaAttention."""
    query, key_cache, value_cache = rotated_and_cached(write, node, activations)
    input_pos = write.op("Cast", inputs_of(node)[-1], to=ir.DataType.INT32.value)
    output = write.op(
        gemma_attention.OP_TYPE,
        query,
        key_cache,
        value_cache,
        input_pos,
        domain=gemma_attention.DOMAIN,
        # All of them, always: a function's defaults do not reach a plugin.
        **asdict(attributes_of(node)),
    )
    return output, key_cache, value_cache

"""The traced ops as standard ONNX of opset 24, for any tool that reads it.

No op of another domain, and no `nonpad_kv_seqlen`, which some tools ignore: who sees what is an
explicit boolean mask.
"""

from collections.abc import Sequence

import onnx_ir as ir

from gemma_deploy.exporters.lowering.nodes import NodeWriter
from gemma_deploy.exporters.lowering.standard_ops import (
    OPSET_VERSION,
    cast_all,
    masked_attention,
    rotated_and_cached,
    visible,
)
from gemma_deploy.exporters.lowering.traced_ops import attributes_of, cache_dtype_of, inputs_of

OPSETS = {"": OPSET_VERSION}


def attention(write: NodeWriter, node: ir.Node, activations: ir.DataType) -> Sequence[ir.Value]:
    """Write `ATTENTION` as RotaryEmbedding, TensorScatter and Attention."""
    attributes = attributes_of(node)
    query, key_cache, value_cache = rotated_and_cached(write, node, activations)
    window = attributes.sliding_window
    mask = visible(
        write,
        query,
        key_cache,
        inputs_of(node)[-1],
        write.op("Constant", value_int=window) if window else None,
    )
    output = masked_attention(
        write,
        query,
        key_cache,
        value_cache,
        mask,
        scale=attributes.scale,
        softcap=attributes.softcap,
    )
    (output,) = cast_all(write, [output], cache_dtype_of(node), activations)
    return output, key_cache, value_cache

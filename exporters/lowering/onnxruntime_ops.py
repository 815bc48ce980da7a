"""The model's ops as ONNX Runtime's own nodes.

Attention is com.microsoft GroupQueryAttention, whose work grows with the valid length of the cache
(the standard op's grows with its capacity) and which updates the cache in place when past and
present are bound to the same memory. Linear layers are com.microsoft FusedMatMul with a transposed
right side: weights stay as the checkpoint has them, [out, in], and ONNX Runtime packs them straight
from the mapped file, without a transposed copy.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset23, values

from gemma_deploy.graph_spec import DType
from gemma_deploy.ops.static_cache_attention import static_cache_attention

OPSET_VERSION = 23

_Schema = onnx.defs.OpSchema
_FLOAT_TYPES = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
TranslationTable = dict[Callable[..., Any], Callable[..., Any]]


def translation_table(weights_dtype: DType) -> TranslationTable:
    """Return torch op -> function that writes its ONNX nodes, for `torch.onnx.export`.

    Args:
        weights_dtype: What the stored matrices hold. bfloat16 is cast to float32 on the way into
            each product, since ONNX Runtime's CPU kernels have no bfloat16 product.
    """
    is_cast = weights_dtype == "bfloat16"

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        stored = opset23.Cast(weight, to=onnx.TensorProto.FLOAT) if is_cast else weight
        product = _fused_mat_mul(x, stored, transB=1)
        return product if bias is None else opset23.Add(product, bias)

    def embedding(weight: Any, indices: Any, *_: object) -> Any:
        rows = opset23.Gather(weight, indices)
        return opset23.Cast(rows, to=onnx.TensorProto.FLOAT) if is_cast else rows

    return {
        torch.ops.aten.linear.default: linear,
        torch.ops.aten.embedding.default: embedding,
        static_cache_attention._opoverload: _attention,
    }


def _attention(  # noqa: PLR0913, PLR0917  # the op's own signature
    query: Any,
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    cos: Any,
    sin: Any,
    input_pos: Any,
    *,
    scale: float,
    softcap: float = 0.0,
    sliding_window: int = 0,
) -> tuple[Any, Any, Any]:
    """Write static_cache_attention as RotaryEmbedding and GroupQueryAttention.

    Every row counts as input_pos + S tokens long, padding included: what padding writes into the
    cache lies beyond the row's true length and is overwritten by its next token.
    """
    num_heads, num_kv_heads = query.shape[2], key.shape[2]
    # Of cos, not of query: one value for all layers, so that repeated nodes can be merged.
    tokens = opset23.Shape(cos, start=1, end=2)
    total = opset23.Add(input_pos, tokens)  # [B]
    last = opset23.Sub(total, _int64(1))
    output, present_key, present_value = _group_query_attention(
        opset23.RotaryEmbedding(_flat(query), cos, sin, num_heads=num_heads),
        opset23.RotaryEmbedding(_flat(key), cos, sin, num_heads=num_kv_heads),
        _flat(value),
        key_cache,
        value_cache,
        opset23.Cast(last, to=onnx.TensorProto.INT32),
        opset23.Cast(opset23.ReduceMax(total, keepdims=0), to=onnx.TensorProto.INT32),
        num_heads=num_heads,
        kv_num_heads=num_kv_heads,
        scale=scale,
        softcap=softcap,
        # Counts the query's own key, as Gemma does; -1 is ONNX Runtime's word for no window.
        local_window_size=sliding_window or -1,
    )
    output = opset23.Reshape(output, _int64(0, 0, num_heads, -1))  # [B, S, N, H]
    return output, present_key, present_value


def _flat(x: Any) -> Any:
    """[B, S, heads, H] -> [B, S, heads * H]."""
    return opset23.Reshape(x, _int64(0, 0, -1))


def _int64(*numbers: int) -> Any:
    return opset23.Constant(value_ints=numbers)


def _contrib_op(
    name: str, inputs: dict[str, str], outputs: dict[str, str], attributes: dict[str, Any]
) -> values.Op:
    """Declare a com.microsoft op: inputs and outputs as name -> type letter (T float, M int32)."""
    types = [("T", _FLOAT_TYPES, ""), ("M", ["tensor(int32)"], "")]
    used = {*inputs.values(), *outputs.values()}
    schema = _Schema(
        name,
        "com.microsoft",
        1,
        inputs=[_Schema.FormalParameter(k, v) for k, v in inputs.items()],
        outputs=[_Schema.FormalParameter(k, v) for k, v in outputs.items()],
        type_constraints=[entry for entry in types if entry[0] in used],
        attributes=[_Schema.Attribute(k, v, required=False) for k, v in attributes.items()],
    )
    return values.Op(values.Opset("com.microsoft", 1), name, schema)


_INT, _FLOAT = _Schema.AttrType.INT, _Schema.AttrType.FLOAT

_fused_mat_mul = _contrib_op("FusedMatMul", {"A": "T", "B": "T"}, {"Y": "T"}, {"transB": _INT})

_group_query_attention = _contrib_op(
    "GroupQueryAttention",
    dict.fromkeys(("query", "key", "value", "past_key", "past_value"), "T")
    | {"seqlens_k": "M", "total_sequence_length": "M"},
    dict.fromkeys(("output", "present_key", "present_value"), "T"),
    {
        "num_heads": _INT,
        "kv_num_heads": _INT,
        "scale": _FLOAT,
        "softcap": _FLOAT,
        "local_window_size": _INT,
    },
)

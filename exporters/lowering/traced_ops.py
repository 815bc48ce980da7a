"""The ops that lowerings write differently, as nodes of a traced graph: one translation of the model.

torch's exporter writes each of them as one node of the domain `DOMAIN`; `lower` then replaces the
nodes by those of a target. Translating the model takes many times as long as lowering it, so all
targets share the translation.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final, cast

import onnx
import onnx_ir as ir
import torch
from onnxscript import values

from gemma_deploy.ops.static_cache_attention import (
    INPUTS,
    StaticCacheAttentionAttributes,
    static_cache_attention,
)

DOMAIN: Final = "gemma_deploy.traced"
LINEAR: Final = "Linear"
"""(x [..., in], weight [out, in], bias [out] or none) -> [..., out]."""
EMBEDDING: Final = "Embedding"
"""(weight [V, D], indices int64 [...]) -> [..., D]."""
ATTENTION: Final = "StaticCacheAttention"
"""Inputs, attributes and outputs of `static_cache_attention`."""

_Schema = onnx.defs.OpSchema
_TYPES = [f"tensor({name})" for name in ("float", "float16", "bfloat16")]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return torch op -> function that writes its node, for `torch.onnx.export`."""
    return {
        torch.ops.aten.linear.default: _linear,
        torch.ops.aten.embedding.default: _embedding,
        static_cache_attention._opoverload: _attention,
    }


def attributes_of(node: ir.Node) -> StaticCacheAttentionAttributes:
    """Return the attributes of a node of the op `ATTENTION`."""
    return StaticCacheAttentionAttributes(
        **{name: attribute.value for name, attribute in node.attributes.items()}
    )


def inputs_of(node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a traced op's node; one without a bias has an input less."""
    return [value for value in node.inputs if value is not None]


def num_heads_of(x: ir.Value) -> int:
    """Return the number of heads of a traced query, key or value, [B, S, heads, H]."""
    # The tracer knows every size but those that are symbolic, and the heads never are.
    return cast(int, cast(ir.Shape, x.shape)[2])


def cache_dtype_of(node: ir.Node) -> ir.DataType:
    """Return what the caches hold that a node of the op `ATTENTION` updates."""
    return cast(ir.DataType, inputs_of(node)[INPUTS.index("key_cache")].dtype)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return (_LINEAR if bias is None else _LINEAR_WITH_BIAS)(*inputs)


def _embedding(weight: Any, indices: Any, *_: object) -> Any:
    return _EMBEDDING(weight, indices)


def _attention(*inputs: Any, **attributes: float) -> Any:
    return _ATTENTION(*inputs, **attributes)


def _op(
    name: str, inputs: dict[str, str], outputs: tuple[str, ...], **attributes: Any
) -> values.Op:
    """Declare an op; inputs as name -> type letter (T float, I int64)."""
    types = [("T", _TYPES, ""), ("I", ["tensor(int64)"], "")]
    schema = _Schema(
        name,
        DOMAIN,
        1,
        inputs=[_Schema.FormalParameter(k, letter) for k, letter in inputs.items()],
        outputs=[_Schema.FormalParameter(k, "T") for k in outputs],
        type_constraints=[entry for entry in types if entry[0] in {*inputs.values(), "T"}],
        attributes=[_Schema.Attribute(k, v, required=False) for k, v in attributes.items()],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


_ATTRIBUTE_TYPES: dict[Any, Any] = {float: _Schema.AttrType.FLOAT, int: _Schema.AttrType.INT}
_LINEAR = _op(LINEAR, {"x": "T", "weight": "T"}, ("y",))
_LINEAR_WITH_BIAS = _op(LINEAR, {"x": "T", "weight": "T", "bias": "T"}, ("y",))
_EMBEDDING = _op(EMBEDDING, {"weight": "T", "indices": "I"}, ("y",))
_ATTENTION = _op(
    ATTENTION,
    dict.fromkeys(INPUTS, "T") | {"input_pos": "I"},
    ("output", "present_key", "present_value"),
    **{
        field.name: _ATTRIBUTE_TYPES[field.type] for field in fields(StaticCacheAttentionAttributes)
    },
)

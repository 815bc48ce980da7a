"""What a bundle's ONNX graph may hold, so that loading it is safe: `check_graph`.

A bundle may be somebody else's, and a graph is a program: ONNX Runtime follows what it says, loops for
ever where it loops, and takes memory from places that it names. So a graph holds what gemma-deploy's own
exports hold, and nothing else is run.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from gemma_deploy.errors import BundleError
from gemma_deploy.graph_tensors import check_tensor, foreign, is_possible
from gemma_deploy.json_files import read_bytes
from gemma_deploy.limits import MAX_DIMS, MAX_GRAPH_BYTES, MAX_GRAPH_PARTS
from gemma_deploy.quoting import shortened

_STANDARD: Final = (
    "Add And Attention BitShift BitwiseAnd BitwiseXor Cast CastLike Concat Constant Cos "
    "DequantizeLinear Div Equal Expand Gather GatherElements Gelu GreaterOrEqual Identity If Less "
    "LessOrEqual MatMul Mul QuantizeLinear Range ReduceMax ReduceSum Reshape RMSNormalization "
    "RotaryEmbedding Shape Sin Slice Squeeze Sub Tanh TensorScatter Transpose Unsqueeze Where"
)
OPERATORS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "": frozenset(_STANDARD.split()),
        "com.microsoft": frozenset(
            {"FusedMatMul", "GroupQueryAttention", "MatMulBnb4", "MatMulNBits"}
        ),
        "gemma_deploy": frozenset({"GemmaAttention"}),
    }
)
"""Every operator that an export has ever written, by its domain."""

# What sizes that a graph states go up to: a vocabulary's, not what takes gigabytes by itself.
_MOST_STATED: Final = 1 << 20
_MOST_EXPANDED: Final = 1 << 24
_MOST_JOINED: Final = 8
_MOST_PER_WEIGHT: Final = 4
_FUNCTION: Final = ("gemma_deploy", "GemmaAttention", "")
# FLOAT, INT, STRING, TENSOR, FLOATS, INTS, STRINGS
_PLAIN_ATTRIBUTES: Final = frozenset({1, 2, 3, 4, 6, 7, 8})
# Texts of several lines, which nothing prints; what external data says is checked with its tensor.
_UNPRINTED: Final = frozenset({"doc_string", "value"})
_PASSES_ON: Final = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


def check_graph(folder: Path, graph: Path, weights: str) -> None:
    """Refuse an ONNX graph that gemma-deploy has not written, or whose data is not all there.

    Operators, their nesting and the sizes that they are given are those of our own exports. External
    data lies in the bundle's weights file, is all there, and says no more than where it lies (what else
    ONNX Runtime reads there, as `prepacked_0`, it follows unchecked).

    Where ONNX's shape inference finds sizes, no value is much larger than the largest weight. What is
    beyond it, permitted operators can still be made to compute.

    Args:
        folder: The bundle.
        graph: The graph's file.
        weights: The weights file's name in the bundle.

    Raises:
        UnsafePathError: An external-data location that leaves the folder.
        BundleError: The graph is not ONNX, holds what no graph of ours holds, or a tensor lies
            outside its file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    raw = read_bytes(
        graph, max_bytes=MAX_GRAPH_BYTES, error=BundleError, remedy="export the checkpoint again"
    )
    try:
        model = onnx.load_model_from_string(raw)
    except DecodeError as err:
        raise BundleError(f"{graph} cannot be read as an ONNX model: {err}") from err
    if graph.suffix != ".onnx":  # ONNX Runtime chooses another reader by the ending
        raise foreign(graph, "its name does not end in .onnx")
    for tensor in _tensors(graph, model):
        check_tensor(folder, graph, weights, tensor)
    _check_model(graph, model)
    _check_nodes(graph, model.graph, is_top=True)
    for function in model.functions:
        _check_nodes(graph, function, is_top=False)
    _check_shapes(graph, model)


def _tensors(graph: Path, model: Any) -> list[Any]:
    """Return every TensorProto, of subgraphs, attributes and functions, too.

    On the way all parts are counted before they are looked at, and strings that command a terminal
    are refused: ONNX Runtime prints names as they are.
    """
    tensors, left, num_parts = [], [model], 1
    while left:
        message = left.pop()
        kind = message.DESCRIPTOR.name
        if kind == "TensorProto":
            tensors.append(message)
        if kind == "SparseTensorProto":
            raise foreign(graph, "it has sparse tensors")
        for field, value in message.ListFields():
            is_text = field.type == field.TYPE_STRING and field.name not in _UNPRINTED
            if not is_text and field.message_type is None:
                continue
            is_one = isinstance(value, str | bytes) or hasattr(value, "ListFields")
            parts = [value] if is_one else value
            num_parts += len(parts)
            if num_parts > MAX_GRAPH_PARTS:
                raise foreign(graph, f"it has more than {MAX_GRAPH_PARTS:,} parts")
            if not is_text:
                left.extend(parts)
                continue
            for text in parts:
                if isinstance(text, bytes) or not text.isprintable():  # bytes: it is not UTF-8
                    raise foreign(graph, f"it has the name {shortened(text)}")
    return tensors


def _check_model(graph: Path, model: Any) -> None:
    """Check all but tensors and nodes: operator sets, functions, and what no export has."""
    for opset in [*model.opset_import, *(x for f in model.functions for x in f.opset_import)]:
        if opset.domain not in OPERATORS:
            raise foreign(graph, f"it imports the operators of {shortened(opset.domain)}")
    for function in model.functions:
        if (function.domain, function.name, function.overload) != _FUNCTION:
            raise foreign(graph, f"it has the function {shortened(function.name)}")
    if len(model.functions) > 1 or model.training_info:
        raise foreign(graph, "it has several functions or a training graph")


def _check_nodes(graph: Path, scope: Any, *, is_top: bool) -> None:
    """Check the nodes of the graph, of one branch of an If, or of a function."""
    import onnx

    for node in scope.node:
        if node.op_type not in OPERATORS.get(node.domain, ()):
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise foreign(graph, f"{_named(node)} is the operator {shortened(operator)}")
        if not is_top and node.op_type in ("If", "GemmaAttention"):
            raise foreign(graph, f"{_named(node)}, {node.op_type}, is inside of another one")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH and node.op_type == "If":
                _check_nodes(graph, attribute.g, is_top=False)
            elif attribute.type not in _PLAIN_ATTRIBUTES:
                raise foreign(
                    graph, f"{_named(node)} has the attribute {shortened(attribute.name)}"
                )
    _check_sizes(graph, scope)


def _check_sizes(graph: Path, scope: Any) -> None:
    """Check the nodes whose outputs are larger than their inputs by what the graph says."""
    made: dict[str, Any] = {output: node for node in scope.node for output in node.output}
    stated: dict[str, Any] = {x.name: x for x in getattr(scope, "initializer", ())}
    stated |= {
        node.output[0]: node.attribute[0]
        for node in scope.node
        if node.op_type == "Constant" and node.output and len(node.attribute) == 1
    }
    joined: set[str] = set()
    for node in scope.node:
        if node.op_type == "Range" and not all(_is_a_size(x, made, stated) for x in node.input):
            raise foreign(graph, f"{_named(node)}, Range, counts to what is no tensor's size")
        if node.op_type == "Expand" and not _is_a_shape(node.input, made, stated):
            raise foreign(graph, f"{_named(node)}, Expand, goes beyond any size of a model")
        is_joined = node.op_type != "Shape" and not joined.isdisjoint(node.input)
        if node.op_type == "Concat" and (is_joined or len(node.input) > _MOST_JOINED):
            raise foreign(graph, f"{_named(node)}, Concat, joins what was joined before")
        if is_joined or node.op_type == "Concat":
            joined.update(node.output)


def _named(node: Any) -> str:
    return f"node {shortened(node.name or next(iter(node.output), ''))}"


def _check_shapes(graph: Path, model: Any) -> None:
    """Refuse values that are far larger than any weight; the model is changed."""
    import onnx

    del model.graph.value_info[:]  # what the graph itself says may be anything
    try:
        inferred = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError as err:
        raise foreign(graph, f"its shapes contradict each other: {shortened(str(err))}") from err
    most = max(math.prod(x.dims) for x in [*inferred.initializer, onnx.TensorProto(dims=[1])])
    for value in (*inferred.value_info, *inferred.output):
        dims = [x.dim_value for x in value.type.tensor_type.shape.dim if x.dim_value]
        limit = max(_MOST_EXPANDED, _MOST_PER_WEIGHT * most)
        if not is_possible(dims) or math.prod(dims) > limit:
            raise foreign(
                graph,
                f"the value {shortened(value.name)} of shape {shortened(dims[: MAX_DIMS + 1])} is "
                "larger than any weight",
            )


def _is_a_shape(inputs: Sequence[str], made: Mapping[str, Any], stated: Mapping[str, Any]) -> bool:
    """Tell whether the last input is a shape of sizes whose stated ones are not large together."""
    if not inputs:
        return False
    name = inputs[-1]
    node = made.get(name)
    parts = node.input if node is not None and node.op_type == "Concat" else [name]
    if len(parts) > _MOST_JOINED or not all(_is_a_size(x, made, stated) for x in parts):
        return False
    numbers = [x for part in parts if part in stated for x in _integers(stated[part])]
    return math.prod(numbers) <= _MOST_EXPANDED


def _is_a_size(name: str, made: Mapping[str, Any], stated: Mapping[str, Any]) -> bool:
    """Tell whether a value is the size of a tensor, or stated and not large."""
    for _ in range(8):  # sizes pass few nodes on their way
        if name in stated:
            numbers = _integers(stated[name])
            return bool(numbers) and all(0 <= x <= _MOST_STATED for x in numbers)
        node = made.get(name)
        if node is None or node.op_type == "Shape":
            return node is not None
        if node.op_type not in _PASSES_ON or not node.input:
            return False
        name = node.input[0]
    return False


def _integers(constant: Any) -> list[int]:
    """Return the few int64 numbers of an initializer or a Constant's attribute; none of any other."""
    import onnx

    if isinstance(constant, onnx.AttributeProto):
        if constant.type == onnx.AttributeProto.INT and not constant.ref_attr_name:
            return [constant.i]
        if constant.type == onnx.AttributeProto.INTS:
            return list(constant.ints) if len(constant.ints) <= _MOST_JOINED else []
        constant = constant.t
    is_int64 = constant.data_type == onnx.TensorProto.INT64
    if not is_int64 or constant.external_data:
        return []
    raw = constant.raw_data
    numbers = np.frombuffer(raw, "<i8") if raw else constant.int64_data
    is_whole = len(numbers) == math.prod(constant.dims) <= _MOST_JOINED
    return [int(x) for x in numbers] if is_whole else []

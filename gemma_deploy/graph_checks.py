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

from gemma_deploy.errors import BundleError
from gemma_deploy.graph_tensors import check_tensor, foreign, messages
from gemma_deploy.json_files import read_bytes
from gemma_deploy.limits import MAX_GRAPH_BYTES
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
    for tensor in messages(model, "TensorProto"):
        check_tensor(folder, graph, weights, tensor)
    _check_model(graph, model)
    _check_nodes(graph, model.graph, is_top=True)
    for function in model.functions:
        _check_nodes(graph, function, is_top=False)
    _check_shapes(graph, model)


def _check_model(graph: Path, model: Any) -> None:
    """Check all but tensors and nodes: operator sets, functions, and what no export has."""
    for opset in [*model.opset_import, *(x for f in model.functions for x in f.opset_import)]:
        if opset.domain not in OPERATORS:
            raise foreign(graph, f"it imports the operators of {shortened(opset.domain)}")
    for function in model.functions:
        if (function.domain, function.name, function.overload) != _FUNCTION:
            raise foreign(graph, f"it has the function {shortened(function.name)}")
    if (
        len(model.functions) > 1
        or model.training_info
        or any(True for _ in messages(model, "SparseTensorProto"))
    ):
        raise foreign(graph, "it has several functions, sparse tensors or a training graph")


def _check_nodes(graph: Path, scope: Any, *, is_top: bool) -> None:
    """Check the nodes of the graph, of one branch of an If, or of a function."""
    import onnx

    _check_names(graph, scope)
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


def _check_names(graph: Path, scope: Any) -> None:
    """Refuse names that command a terminal: ONNX Runtime itself prints them as they are."""
    named = ("initializer", "input", "output", "value_info")
    names = [getattr(x, "name", x) for field in named for x in getattr(scope, field, ())]
    for node in scope.node:
        names += [node.name, *node.input, *node.output]
    for name in names:
        if isinstance(name, bytes) or not name.isprintable():  # bytes where it is not UTF-8
            raise foreign(graph, f"it has the name {shortened(name)}")


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
        if not 0 <= math.prod(dims) <= max(_MOST_EXPANDED, _MOST_PER_WEIGHT * most):
            raise foreign(
                graph,
                f"the value {shortened(value.name)} of shape {dims[:8]} is larger than any weight",
            )


def _is_a_shape(inputs: Sequence[str], made: Mapping[str, Any], stated: Mapping[str, Any]) -> bool:
    """Tell whether the last input is a shape of sizes whose stated ones are not large together."""
    if not inputs:
        return False
    name = inputs[-1]
    node = made.get(name)
    parts = node.input if node is not None and node.op_type == "Concat" else [name]
    product = 1
    for part in parts:
        if part in stated:
            product *= math.prod(_integers(stated[part]) or [_MOST_EXPANDED + 1])
        if not _is_a_size(part, made, stated):
            return False
    return product <= _MOST_EXPANDED


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
    """Return the int64 numbers of an initializer or of a Constant's attribute; none of any other."""
    import onnx

    if isinstance(constant, onnx.AttributeProto):
        if constant.type == onnx.AttributeProto.INT and not constant.ref_attr_name:
            return [constant.i]
        if constant.type == onnx.AttributeProto.INTS:
            return list(constant.ints)
        constant = constant.t
    is_int64 = constant.data_type == onnx.TensorProto.INT64
    if not is_int64 or constant.external_data or math.prod(constant.dims) > _MOST_JOINED:
        return []
    return [int(x) for x in onnx.numpy_helper.to_array(constant).reshape(-1)]

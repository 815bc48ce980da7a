import functools
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from gemma_deploy.errors import BundleError
from gemma_deploy.graph_checks import check_graph
from gemma_deploy.limits import MAX_GRAPH_BYTES, MAX_GRAPH_PARTS

LONG_TENSOR = (1 << 20) + 1


def check(
    folder: Path, *nodes: NodeProto, change: Callable[[onnx.ModelProto], object] = lambda _: None
) -> None:
    numbers = {"zero": 0, "one": 1, "large": LONG_TENSOR, "wide": 1 << 20}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["B"])],
        [],
        [helper.make_tensor(name, TensorProto.INT64, [], [x]) for name, x in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    change(model)
    path = folder / "prefill.onnx"
    path.write_bytes(model.SerializeToString())
    check_graph(folder, path, "weights.safetensors")


def branch(*nodes: NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "b", [], [])


def an_if(*nodes: NodeProto) -> NodeProto:
    return helper.make_node("If", ["c"], ["y"], then_branch=branch(*nodes), else_branch=branch())


def constant(name: str, *numbers: int) -> NodeProto:
    return helper.make_node("Constant", [], [name], value_ints=list(numbers))


@pytest.mark.parametrize(
    ("op_type", "domain"),
    [
        ("Loop", ""),
        ("Scan", ""),
        ("ConstantOfShape", ""),
        ("Tile", ""),
        ("Pad", ""),
        ("Resize", ""),
        ("RandomNormal", ""),
        ("SequenceMap", ""),
        ("NoSuchOperator", ""),
        ("Add", "com.microsoft"),
        ("MatMul", "org.pytorch.aten"),
    ],
)
@pytest.mark.parametrize("is_nested", [False, True])
def test_operators_of_others(tmp_path: Path, op_type: str, domain: str, is_nested: bool) -> None:
    node = helper.make_node(op_type, ["x"], ["bomb"], domain=domain)
    name = f"{domain}.{op_type}" if domain else op_type
    message = f"prefill.onnx: node 'bomb' is the operator '{name}': gemma-deploy has not written"
    with pytest.raises(BundleError, match=message):
        check(tmp_path, an_if(node) if is_nested else node)


def test_an_if_inside_of_another_one(tmp_path: Path) -> None:
    check(tmp_path, an_if(helper.make_node("Add", ["x", "x"], ["y"])))
    with pytest.raises(BundleError, match="node 'y', If, is inside of another one"):
        check(tmp_path, an_if(an_if()))


@pytest.mark.parametrize("name", ["\x1b]0;pwned\x07", "a\nb", "\x9b2J", "gnp\u202e"])
def test_names_that_command_a_terminal(tmp_path: Path, name: str) -> None:
    """ONNX Runtime prints a node's name as it is where the node fails."""
    message = re.escape(f"it has the name {name!r}")
    node = helper.make_node("Add", ["x", "x"], ["y"])
    for named in (
        helper.make_node("Add", ["x", "x"], ["y"], name=name),
        helper.make_node("Add", ["x", name], ["y"]),
        helper.make_node("Add", ["x", "x"], [name]),
        an_if(helper.make_node("Add", ["x", "x"], ["y"], name=name)),
    ):
        with pytest.raises(BundleError, match=message):
            check(tmp_path, named)
    tensor = helper.make_tensor(name, TensorProto.INT64, [], [1])
    with pytest.raises(BundleError, match=message):
        check(tmp_path, node, change=lambda model: model.graph.initializer.append(tensor))


def test_every_name_is_looked_at(tmp_path: Path) -> None:
    name = "\x1b[2J"
    value = helper.make_tensor_value_info("v", TensorProto.INT64, [name])
    changes: list[Callable[[onnx.ModelProto], object]] = [
        lambda model: setattr(model.graph, "name", name),
        lambda model: setattr(model, "producer_name", name),
        lambda model: model.graph.node[0].attribute.add(name=name, type=2),
        lambda model: model.graph.node[0].attribute.add(name="a", ref_attr_name=name, type=2),
        lambda model: model.graph.value_info.append(value),
        lambda model: model.graph.input.append(value),
    ]
    for change in changes:
        with pytest.raises(BundleError, match=re.escape(f"it has the name {name!r}")):
            check(tmp_path, helper.make_node("Add", ["x", "x"], ["y"]), change=change)


def many(field: str, count: int = MAX_GRAPH_PARTS) -> Callable[[onnx.ModelProto], object]:
    """Return what fills a field of the graph with the least that it can hold."""

    def fill(model: onnx.ModelProto) -> None:
        number = model.graph.DESCRIPTOR.fields_by_name[field].number
        model.graph.MergeFromString(bytes([number << 3 | 2, 0]) * count)

    return fill


@pytest.mark.parametrize("field", ["node", "value_info", "initializer", "input"])
def test_graphs_of_more_parts_than_a_model_has(tmp_path: Path, field: str) -> None:
    with pytest.raises(BundleError, match=r"prefill.onnx: it has more than 262,144 parts"):
        check(tmp_path, change=many(field))


def test_nodes_of_more_parts_than_a_model_has(tmp_path: Path) -> None:
    wide = helper.make_node("Add", [""] * MAX_GRAPH_PARTS, ["y"])
    deep = helper.make_node("Add", ["x", "x"], ["y"])
    deep.MergeFromString(b"\x2a\0" * MAX_GRAPH_PARTS)
    for node in (wide, deep, an_if(wide)):
        with pytest.raises(BundleError, match="more than 262,144 parts"):
            check(tmp_path, node)


def test_graphs_of_more_bytes_than_a_model_has(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"prefill.onnx is larger than 8,388,608 bytes"):
        check(tmp_path, change=many("node", MAX_GRAPH_BYTES // 2))


def add_output(value: onnx.ValueInfoProto, model: onnx.ModelProto) -> None:
    model.graph.output.append(value)


def test_numbers_without_an_end(tmp_path: Path) -> None:
    """Neither the number of sizes nor the sizes may take long to be multiplied."""
    expand = helper.make_node("Expand", ["x", "target"], ["y"])
    for numbers in ([(1 << 62) - 1] * 300_000, [1] * 9):
        with pytest.raises(BundleError, match="node 'y', Expand, goes beyond any size of a model"):
            check(tmp_path, constant("target", *numbers), expand)
    for dims in ([1 << 62] * 235, [-1, -1], [1] * 9):
        value = helper.make_tensor_value_info("v", TensorProto.INT64, dims)
        with pytest.raises(BundleError, match=r"the value 'v' of shape .* is larger than any w"):
            check(tmp_path, change=functools.partial(add_output, value))


def test_graphs_in_other_nodes(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "x"], ["y"], body=branch())
    with pytest.raises(BundleError, match="node 'y' has the attribute 'body'"):
        check(tmp_path, node)
    node = helper.make_node("If", ["c"], ["y"], branches=[branch()])
    with pytest.raises(BundleError, match="node 'y' has the attribute 'branches'"):
        check(tmp_path, node)


def function(name: str, *nodes: NodeProto, domain: str = "gemma_deploy") -> onnx.FunctionProto:
    return helper.make_function(domain, name, ["x"], ["y"], nodes, [helper.make_opsetid("", 24)])


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        ([function("Other")], "it has the function 'Other'"),
        ([function("Add", domain="")], "it has the function 'Add'"),
        ([function("GemmaAttention")] * 2, "it has several functions"),
        (
            [function("GemmaAttention", helper.make_node("Loop", ["x"], ["y"]))],
            "node 'y' is the operator 'Loop'",
        ),
        (
            [
                function(
                    "GemmaAttention",
                    helper.make_node("GemmaAttention", ["x"], ["y"], domain="gemma_deploy"),
                )
            ],
            "node 'y', GemmaAttention, is inside of another one",
        ),
    ],
)
def test_functions(tmp_path: Path, functions: list[onnx.FunctionProto], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check(tmp_path, change=lambda model: model.functions.extend(functions))


def test_what_no_export_has(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="it has several functions or a training graph"):
        check(tmp_path, change=lambda model: model.training_info.add())
    with pytest.raises(BundleError, match="it has sparse tensors"):
        check(tmp_path, change=lambda model: model.graph.sparse_initializer.add())
    with pytest.raises(BundleError, match=r"it imports the operators of 'ai.onnx.training'"):
        check(tmp_path, change=lambda model: model.opset_import.add(domain="ai.onnx.training"))


def test_sizes_of_tensors_are_counted_to(tmp_path: Path) -> None:
    check(
        tmp_path,
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Squeeze", ["shape"], ["size"]),
        helper.make_node("Range", ["zero", "size", "one"], ["y"]),
        constant("width", 256),
        helper.make_node("Concat", ["shape", "width"], ["target"], axis=0),
        helper.make_node("Expand", ["x", "target"], ["z"]),
    )


@pytest.mark.parametrize("limit", ["large", "x", "sum"])
def test_other_numbers_are_not_counted_to(tmp_path: Path, limit: str) -> None:
    with pytest.raises(BundleError, match="node 'y', Range, counts to what is no tensor's size"):
        check(
            tmp_path,
            helper.make_node("Mul", ["wide", "wide"], ["sum"]),
            helper.make_node("Range", ["zero", limit, "one"], ["y"]),
        )


@pytest.mark.parametrize(
    "shape",
    [
        [constant("target", 1 << 20, 1 << 20)],
        [constant("target", LONG_TENSOR)],
        [constant("a", 1 << 20), helper.make_node("Concat", ["a", "a"], ["target"], axis=0)],
        [helper.make_node("Mul", ["wide", "wide"], ["target"])],
        [helper.make_node("Identity", ["x"], ["target"])],
    ],
)
def test_expanding_beyond_any_model(tmp_path: Path, shape: list[NodeProto]) -> None:
    with pytest.raises(BundleError, match="node 'y', Expand, goes beyond any size of a model"):
        check(tmp_path, *shape, helper.make_node("Expand", ["x", "target"], ["y"]))


def test_joining_again_and_again(tmp_path: Path) -> None:
    twice = helper.make_node("Concat", ["x", "x"], ["twice"], axis=0)
    check(tmp_path, twice)
    between = helper.make_node("Add", ["twice", "twice"], ["sum"])
    again = helper.make_node("Concat", ["sum", "sum"], ["y"], axis=0)
    with pytest.raises(BundleError, match="node 'y', Concat, joins what was joined before"):
        check(tmp_path, twice, between, again)
    with pytest.raises(BundleError, match="node 'y', Concat, joins what was joined before"):
        check(tmp_path, helper.make_node("Concat", ["x"] * 9, ["y"], axis=0))


def test_values_far_larger_than_any_weight(tmp_path: Path) -> None:
    """A sum of a column and a row is as large as their sizes multiplied."""

    def add_column(model: onnx.ModelProto, height: int, width: int = 8192) -> None:
        for name, dims in (("column", [height, 1]), ("row", [1, width])):
            tensor = helper.make_tensor(name, TensorProto.INT8, dims, bytes(max(dims)), raw=True)
            model.graph.initializer.append(tensor)
        # What the graph says of its values is not believed.
        stated = helper.make_tensor_value_info("sum", TensorProto.INT8, [1, 1])
        model.graph.value_info.append(stated)

    add = helper.make_node("Add", ["column", "row"], ["sum"])
    check(tmp_path, add, change=lambda model: add_column(model, 2048))
    message = r"the value 'sum' of shape \[8192, 8192\] is larger than any weight"
    with pytest.raises(BundleError, match=message):
        check(tmp_path, add, change=lambda model: add_column(model, 8192))


@pytest.mark.parametrize("content", [b"no graph", None])
def test_a_file_that_is_no_graph(tmp_path: Path, content: bytes | None) -> None:
    graph = tmp_path / "graph.onnx"
    if content is not None:
        graph.write_bytes(content)
    with pytest.raises(BundleError, match=r"graph.onnx cannot be read"):
        check_graph(tmp_path, graph, "weights.safetensors")


def test_a_name_that_means_another_format(tmp_path: Path) -> None:
    """ONNX Runtime reads a file that is called so as its own format, which nothing here checks."""
    graph = tmp_path / "graph.ort"
    graph.write_bytes(b"")
    with pytest.raises(BundleError, match=r"graph.ort: its name does not end in .onnx"):
        check_graph(tmp_path, graph, "weights.safetensors")

"""Only reshapes that surely undo each other go."""

from collections.abc import Sequence

import onnx_ir as ir
import pytest

from gemma_deploy.exporters.passes.inverse_reshapes import drop_inverse_reshapes

Dims = Sequence[int | str | None]


def value(name: str, dims: Dims | None) -> ir.Value:
    shape = None if dims is None else ir.Shape(dims)
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)


def graph_of(source: Dims | None, back: Dims | None, op_type: str = "Reshape") -> ir.Model:
    """Return x -> Reshape -> `op_type` -> Identity -> y."""
    x, shapes = value("x", source), [value("shape_0", [4]), value("shape_1", [3])]
    split = ir.node("Reshape", [x, shapes[0]])
    flat = ir.node(op_type, [split.outputs[0], shapes[1]])
    flat.outputs[0].shape = None if back is None else ir.Shape(back)
    copied = ir.node("Identity", [flat.outputs[0]])
    nodes = [split, flat, copied]
    graph = ir.Graph([x, *shapes], copied.outputs, nodes=nodes, opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def read_by_the_last(model: ir.Model) -> ir.Value | None:
    return model.graph[-1].inputs[0]


def test_the_first_input_takes_the_place_of_an_inverse_pair() -> None:
    model = graph_of(["B", "S", 64], ["B", "S", 64])
    drop_inverse_reshapes(model)
    assert read_by_the_last(model) is model.graph.inputs[0]


@pytest.mark.parametrize(
    ("source", "back"),
    [
        (["B", "S", 64], ["S", "B", 64]),
        (["B", "S", 64], ["B", "S", 32]),
        (["B", "S", 64], ["B", 64]),
        ([None, "S", 64], [None, "S", 64]),
        (None, ["B", "S", 64]),
        (["B", "S", 64], None),
    ],
)
def test_other_pairs_stay(source: Dims | None, back: Dims | None) -> None:
    model = graph_of(source, back)
    drop_inverse_reshapes(model)
    assert read_by_the_last(model) is model.graph[1].outputs[0]


def test_other_operators_stay() -> None:
    model = graph_of(["B", "S", 64], ["B", "S", 64], op_type="Expand")
    drop_inverse_reshapes(model)
    assert read_by_the_last(model) is model.graph[1].outputs[0]

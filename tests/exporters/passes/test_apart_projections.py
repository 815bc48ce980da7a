import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from gemma_deploy.exporters.passes.apart_projections import keep_projections_apart

WEIGHTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")
SIZE = 3


def _model() -> onnx.ModelProto:
    """Four products of one input, as a layer's projections are written."""
    random = np.random.default_rng(0)
    nodes, initializers = [], []
    for name in WEIGHTS:
        weight = random.standard_normal((SIZE, SIZE)).astype(np.float16)
        full_name = f"model.layers.0.{name}.weight"
        initializers.append(numpy_helper.from_array(weight, full_name))
        nodes.append(helper.make_node("Transpose", [full_name], [f"{name}.t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", f"{name}.t"], [name]))
    half = onnx.TensorProto.FLOAT16
    outputs = [helper.make_tensor_value_info(name, half, ["B", SIZE]) for name in WEIGHTS]
    inputs = [helper.make_tensor_value_info("x", half, ["B", SIZE])]
    graph = helper.make_graph(nodes, "projections", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def _inputs_of_products(model: ir.Model) -> dict[str, str]:
    return {
        str(node.outputs[0].name): str(node.inputs[0] and node.inputs[0].name)
        for node in model.graph
        if node.op_type == "MatMul"
    }


def test_only_the_second_feed_forward_product_gets_an_input_of_its_own() -> None:
    model = ir.from_proto(_model())
    keep_projections_apart(model)
    read = _inputs_of_products(model)
    assert [read[name] == "x" for name in WEIGHTS] == [True, True, True, False]


def test_quantized_products_are_kept_apart_as_well() -> None:
    model = ir.from_proto(_model())
    for node in [node for node in model.graph if node.op_type == "Transpose"]:
        name = str(node.inputs[0] and node.inputs[0].name)
        codes = ir.tensor(np.zeros((SIZE, SIZE), np.int8), name=f"{name}.int8")
        scales = ir.tensor(np.ones(SIZE, np.float16), name=f"{name}.scales")
        values = [
            ir.Value(name=x.name, type=ir.TensorType(x.dtype), const_value=x)
            for x in (codes, scales)
        ]
        for value in values:
            model.graph.register_initializer(value)
        dequantize = ir.node("DequantizeLinear", values, attributes={"axis": 0})
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(0, dequantize.outputs[0])
    keep_projections_apart(model)
    read = _inputs_of_products(model)
    assert [read[name] == "x" for name in WEIGHTS] == [True, True, True, False]


def test_nothing_else_changes() -> None:
    before = _model()
    model = ir.from_proto(before)
    keep_projections_apart(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after)
    x = {"x": np.random.default_rng(1).standard_normal((2, SIZE)).astype(np.float16)}
    expected = ReferenceEvaluator(before).run(None, x)
    for got, wanted in zip(ReferenceEvaluator(after).run(None, x), expected, strict=True):
        assert got.dtype == np.float16
        np.testing.assert_array_equal(got, wanted)

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import onnx
import pytest
from onnx import TensorProto, helper

from gemma_deploy.errors import EngineBuildError
from gemma_deploy.exporters.engine.build import plan_build
from gemma_deploy.exporters.engine.builder import PlanJob, _builder_config, write_plan
from gemma_deploy.exporters.engine.prepared_graph import (
    Initializer,
    PreparedGraph,
    prepare_graph,
)
from gemma_deploy.exporters.engine.profiles import ShapeRange
from gemma_deploy.file_records import sha256_of
from gemma_deploy.graph_spec import GraphSpec, TensorSpec
from gemma_deploy.tensorrt import load_library

if TYPE_CHECKING:
    from tests.exporters.engine.conftest import EngineBundles, Options

RTX = load_library("tensorrt-rtx")
SPEC = GraphSpec(
    phase="prefill",
    inputs=(TensorSpec(name="x", dtype="float16", dims=("B", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", dims=("B", 3)),),
)


def _proto(*nodes: onnx.NodeProto) -> bytes:
    """A model x float16 [B, 4] -> y float32 [B, 3] over one weight in a file that need not exist."""
    weight = TensorProto(
        name="w", data_type=TensorProto.FLOAT16, dims=[4, 3], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", "nowhere"), ("offset", "2"), ("length", "24")):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        nodes
        or [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["B", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return bytes(model.SerializeToString())


@pytest.fixture
def job(engine_bundle: EngineBundles, rtx_options: Options, tmp_path: Path) -> PlanJob:
    (tmp_path / "weights").write_bytes(bytes(26))
    build = plan_build(engine_bundle("gemma1"), rtx_options(attention="native"), RTX, gpus=[])
    return PlanJob(
        build=build,
        graph=PreparedGraph(
            proto=_proto(),
            initializers=[Initializer(name="w", offset=2, size_bytes=24)],
            weights_path=tmp_path / "weights",
        ),
        spec=SPEC,
        profiles=[{"x": ShapeRange(smallest=(1, 4), usual=(2, 4), largest=(5, 4))}],
    )


def test_a_plan_is_written_and_hashed_on_the_way(job: PlanJob, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    record = write_plan(RTX, job, path)
    assert record.size_bytes == path.stat().st_size
    assert record.sha256 == sha256_of(path)


def test_rtx_is_told_that_steps_will_be_recorded(job: PlanJob) -> None:
    config = _builder_config(RTX, RTX.module.Builder(RTX.log.logger), job)
    assert config.get_flag(RTX.module.BuilderFlag.REQUIRE_USER_ALLOCATION)


def test_a_library_that_gives_no_builder(job: PlanJob, tmp_path: Path) -> None:
    def builder(_logger: object) -> None:
        RTX.log.add("ERROR", "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    library = dataclasses.replace(RTX, module=SimpleNamespace(Builder=builder))
    with pytest.raises(
        EngineBuildError, match=r"made no builder; .*:\nCUDA initialization failure"
    ):
        write_plan(library, job, tmp_path / "plan")


def _with_spec(job: PlanJob, **changes: Any) -> PlanJob:
    (x,) = SPEC.inputs
    spec = dataclasses.replace(SPEC, inputs=(dataclasses.replace(x, **changes),))
    return dataclasses.replace(job, spec=spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "z"}, r"the graph's inputs are x, expected z: it does not belong"),
        ({"dtype": "bfloat16"}, r"x is HALF \[-1, 4\], expected BF16 \['B', 4\]"),
        ({"dims": ("B", 5)}, r"x is HALF \[-1, 4\], expected HALF \['B', 5\]"),
        ({"dims": ("B", "S")}, r"expected HALF \['B', 'S'\]"),
        ({"dims": ("B", 4, 1)}, r"expected HALF \['B', 4, 1\]"),
    ],
)
def test_a_graph_that_is_not_the_model_s(
    changes: dict[str, Any], message: str, job: PlanJob, tmp_path: Path
) -> None:
    with pytest.raises(EngineBuildError, match=message):
        write_plan(RTX, _with_spec(job, **changes), tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_what_is_no_onnx(job: PlanJob, tmp_path: Path) -> None:
    graph = dataclasses.replace(job.graph, proto=b"no")
    with pytest.raises(EngineBuildError, match=r"tensorrt-rtx 1\..* could not read the graph:\n."):
        write_plan(RTX, dataclasses.replace(job, graph=graph), tmp_path / "plan")


def test_a_weight_of_another_size(job: PlanJob, tmp_path: Path) -> None:
    short = [Initializer(name="w", offset=0, size_bytes=23)]
    graph = dataclasses.replace(job.graph, initializers=short)
    with pytest.raises(EngineBuildError, match=r"refused the weight w:\n."):
        write_plan(RTX, dataclasses.replace(job, graph=graph), tmp_path / "plan")


def test_an_op_the_parser_does_not_know(job: PlanJob, tmp_path: Path) -> None:
    unknown = helper.make_node("Unknowable", ["x", "w"], ["y"], domain="somewhere")
    graph = dataclasses.replace(job.graph, proto=_proto(unknown))
    with pytest.raises(EngineBuildError, match=r"could not parse the graph:\n(.|\n)*Unknowable"):
        write_plan(RTX, dataclasses.replace(job, graph=graph), tmp_path / "plan")


def test_a_profile_that_does_not_fit(job: PlanJob, tmp_path: Path) -> None:
    wrong = [{"x": ShapeRange(smallest=(1, 4), usual=(2, 5), largest=(5, 5))}]
    with pytest.raises(EngineBuildError, match=r"could not build the engine:\n."):
        write_plan(RTX, dataclasses.replace(job, profiles=wrong), tmp_path / "plan")


def test_every_weight_is_a_place_in_the_weights_file(
    engine_bundle: EngineBundles, rtx_options: Options
) -> None:
    bundle = engine_bundle("gemma1")
    build = plan_build(bundle, rtx_options(attention="native"), RTX, gpus=[])
    graph, spec = prepare_graph(bundle, "prefill", build, RTX)
    assert graph.weights_path == bundle.weights_path
    stored = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load_from_string(graph.proto).graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }
    assert {x.name: (str(x.offset), str(x.size_bytes)) for x in graph.initializers} == {
        name: (entry["offset"], entry["length"]) for name, entry in stored.items()
    }
    assert "model.layers.2.mlp.down_proj.weight" in stored
    assert len(graph.proto) < 200_000
    assert spec.inputs[-1].dims == ("B", 1, 64, 64)

"""Engines with `GemmaAttention` nodes, built by the library on a CPU; none can run here."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gemma_deploy.errors import EngineBuildError, EngineError
from gemma_deploy.plugins.attention import (
    PLUGIN_NAME,
    PLUGIN_NAMESPACE,
    PLUGIN_VERSION,
    register_plugin,
)
from gemma_deploy.plugins.attention import plugin as plugin_module
from gemma_deploy.plugins.attention.launch import Scalars, Tensors
from gemma_deploy.plugins.attention.schedule import (
    HEAD_DIMS,
    MAX_GROUP,
    CallShape,
    KernelShape,
)
from gemma_deploy.tensorrt import TensorRTLibrary, load_library

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("triton")

from gemma_deploy.plugins.attention.compile import compile_archive

HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 4, 2, 64, 128
TARGETS = ("8.9",)
ATTRIBUTES: dict[str, Any] = {"scale": 0.125, "softcap": 0.0, "sliding_window": 0}


@pytest.fixture
def library() -> Iterator[TensorRTLibrary]:
    library = load_library("tensorrt-rtx")
    library.log.take_errors()
    register_plugin(library, TARGETS)
    yield library
    register_plugin(library, TARGETS)


def make_graph(
    layers: Sequence[dict[str, Any]],
    dtype: int = TensorProto.FLOAT16,
    *,
    num_heads: int = HEADS,
    head_dim: int = HEAD_DIM,
) -> bytes:
    """Chain layers, each a cache update and attention."""
    query: list[Any] = ["B", "S", num_heads, head_dim]
    update: list[Any]
    cache: list[Any]
    update, cache = ["B", KV_HEADS, "S", head_dim], ["B", KV_HEADS, CAPACITY, head_dim]
    make_value = helper.make_tensor_value_info
    inputs = [make_value("query", dtype, query), make_value("input_pos", TensorProto.INT32, ["B"])]
    nodes, outputs, last = [], [], "query"
    for i, attributes in enumerate(layers):
        for name in (f"key{i}", f"value{i}"):
            inputs += [make_value(name, dtype, update), make_value(f"past.{name}", dtype, cache)]
            outputs.append(make_value(f"present.{name}", dtype, cache))
            scatter = [f"past.{name}", name, "input_pos"]
            nodes.append(helper.make_node("TensorScatter", scatter, [outputs[-1].name], axis=2))
        taken = [last, f"present.key{i}", f"present.value{i}", "input_pos"]
        last = f"attention{i}"
        found_by = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
        node = helper.make_node(
            PLUGIN_NAME, taken, [last], domain="gemma_deploy", name=last, **found_by, **attributes
        )
        nodes.append(node)
    graph = helper.make_graph(nodes, "g", inputs, [*outputs, make_value(last, dtype, query)])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("gemma_deploy", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def build(
    library: TensorRTLibrary,
    graph: bytes,
    profiles: Sequence[tuple[int, int]] = ((4, 16),),
    targets: Sequence[str] = TARGETS,
) -> tuple[bytes | None, str]:
    """Return the plan (None if there is none), and what the library said."""
    trt, logger = library.module, library.log.logger
    builder = trt.Builder(logger)
    network, config = builder.create_network(0), builder.create_builder_config()
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        return None, library.log.take_errors()
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        constant = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}")
        config.set_compute_capability(constant, index)
    for max_batch, max_tokens in profiles:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            low, high = list(tensor.shape), list(tensor.shape)
            low[0], high[0] = 1, max_batch
            if -1 in high:
                place = high.index(-1)
                low[place], high[place] = 1, max_tokens
            profile.set_shape(tensor.name, low, high, high)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan), library.log.take_errors()


@pytest.mark.parametrize(
    "profiles", [((4, 16),), ((4, 16), (4, 1))], ids=["one-profile", "two-profiles"]
)
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    "layers",
    [[ATTRIBUTES], [ATTRIBUTES | {"sliding_window": 8}, ATTRIBUTES, ATTRIBUTES]],
    ids=["one-layer", "three-layers"],
)
def test_engines_build(
    library: TensorRTLibrary,
    layers: list[dict[str, Any]],
    dtype: int,
    profiles: Sequence[tuple[int, int]],
) -> None:
    plan, errors = build(library, make_graph(layers, dtype), profiles)
    assert plan is not None, errors
    assert not errors


def test_kernels_cost_little_of_a_plan(library: TensorRTLibrary) -> None:
    plans = [build(library, make_graph([ATTRIBUTES] * count))[0] or b"" for count in (1, 2)]
    shape = KernelShape(head_dim=HEAD_DIM, group=2, dtype="float16", has_softcap=False)
    kernels = compile_archive(shape, (89,)).to_bytes()
    # The library stores a plugin's fields twice for each profile.
    assert [plan.count(kernels) for plan in plans] == [2, 4]
    assert len(kernels) < 40_000


def test_several_targets_and_softcap(library: TensorRTLibrary) -> None:
    targets = ("8.0", "8.9")
    register_plugin(library, targets)
    plan, errors = build(library, make_graph([ATTRIBUTES | {"softcap": 50.0}]), targets=targets)
    assert plan is not None, errors


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({"layers": [{"scale": 0.1}]}, "lacks the attributes softcap, sliding_window"),
        ({"layers": [ATTRIBUTES | {"scale": 0.0}]}, "expected a positive scale"),
        ({"layers": [ATTRIBUTES], "num_heads": 3}, "3 query heads and 2 KV heads"),
        ({"layers": [ATTRIBUTES], "head_dim": 512}, f"head_dim of 16 to {HEAD_DIMS[-1]}"),
        ({"layers": [ATTRIBUTES], "num_heads": 4 * MAX_GROUP}, "1 to 64 query heads per KV head"),
    ],
)
def test_says_what_it_cannot_do(
    library: TensorRTLibrary, graph: dict[str, Any], message: str
) -> None:
    plan, errors = build(library, make_graph(**graph))
    assert plan is None
    assert message in errors


def test_needs_to_know_the_targets(library: TensorRTLibrary) -> None:
    register_plugin(library)
    plan, errors = build(library, make_graph([ATTRIBUTES]))
    assert plan is None
    assert "name them with --compute-capability" in errors


def test_float32_has_no_kernels(library: TensorRTLibrary) -> None:
    assert build(library, make_graph([ATTRIBUTES], TensorProto.FLOAT))[0] is None


@pytest.mark.parametrize("target", ["89", "sm_89", "8.", "8.x"])
def test_refuses_what_is_no_target(library: TensorRTLibrary, target: str) -> None:
    with pytest.raises(EngineBuildError, match=f"'{target}' is no compute capability"):
        register_plugin(library, (target,))


def create(library: TensorRTLibrary, fields: dict[str, Any], phase: str) -> Any:
    """Create a plugin as the library does when it reads an engine."""
    trt = library.module
    registry = trt.get_plugin_registry()
    creator = registry.get_creator(PLUGIN_NAME, PLUGIN_VERSION, PLUGIN_NAMESPACE)
    kinds = {"f": "FLOAT32", "i": "INT32", "u": "UNKNOWN"}
    arrays = {name: np.asarray(value) for name, value in fields.items()}
    collection = trt.PluginFieldCollection(
        [
            trt.PluginField(name, array, getattr(trt.PluginFieldType, kinds[array.dtype.kind]))
            for name, array in arrays.items()
        ]
    )
    return creator.create_plugin("attention", collection, getattr(trt.TensorRTPhase, phase))


def described(library: TensorRTLibrary, *dims: Sequence[int]) -> list[Any]:
    trt = library.module
    dtypes = [trt.bfloat16] * 3 + [trt.int32]
    descs = [SimpleNamespace(dims=d, type=t) for d, t in zip(dims, dtypes, strict=True)]
    return [SimpleNamespace(desc=desc, max=desc.dims) for desc in descs]


SCALAR_FIELDS: dict[str, Any] = {
    "scale": np.array([0.125], np.float32),
    "softcap": np.array([30.0], np.float32),
    "sliding_window": np.array([512], np.int32),
}


def test_what_is_serialized_makes_the_same_plugin(library: TensorRTLibrary) -> None:
    built = create(library, SCALAR_FIELDS, "BUILD")
    cache = (4, KV_HEADS, CAPACITY, HEAD_DIM)
    inputs = described(library, (4, 16, HEADS, HEAD_DIM), cache, cache, (4,))
    built.configure_plugin(inputs, [])
    collection = built.get_fields_to_serialize()
    # TensorRT reads the memory after the call: nobody else may have got it by then.
    others = [np.array([-1.0], np.float32) for _ in range(1000)]
    fields = {field.name: field.data.copy() for field in collection}
    assert others
    kernels = fields.pop("kernels").view(np.uint8)
    assert {name: value.tolist() for name, value in fields.items()} == {
        name: value.tolist() for name, value in SCALAR_FIELDS.items()
    }
    loaded = create(library, {**fields, "kernels": kernels}, "RUNTIME").attach_to_context(None)
    again = {field.name: field.data.tobytes() for field in loaded.get_fields_to_serialize()}
    assert again["kernels"] == kernels.tobytes()
    loaded.on_shape_change([i.desc for i in inputs], [])
    assert loaded.get_workspace_size(inputs, []) == built.get_workspace_size(inputs, []) > 0
    other = described(library, (4, 16, KV_HEADS, HEAD_DIM), cache, cache, (4,))
    with pytest.raises(EngineError, match="the plan is damaged"):
        loaded.on_shape_change([i.desc for i in other], [])
    kernels[100] ^= 1
    with pytest.raises(EngineError, match="checksum is wrong"):
        create(library, {**fields, "kernels": kernels}, "RUNTIME")


def test_running_launches_its_kernels_on_its_tensors(
    library: TensorRTLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = create(library, SCALAR_FIELDS, "BUILD")
    cache = (4, KV_HEADS, CAPACITY, HEAD_DIM)
    inputs = described(library, (4, 5, HEADS, HEAD_DIM), cache, cache, (4,))
    plugin.configure_plugin(inputs, [])
    launched: list[tuple[Any, ...]] = []

    def load(archive: Any) -> Any:
        return SimpleNamespace(run=lambda *arguments: launched.append((archive, *arguments)))

    monkeypatch.setattr(plugin_module, "load_kernels", load)
    plugin.enqueue([i.desc for i in inputs], [], [1, 2, 3, 4], [5], 6, 7)
    shape = KernelShape(head_dim=HEAD_DIM, group=2, dtype="bfloat16", has_softcap=True)
    assert launched == [
        (
            compile_archive(shape, (89,)),
            CallShape(batch=4, num_tokens=5, num_kv_heads=KV_HEADS, capacity=CAPACITY),
            Tensors(query=1, key_cache=2, value_cache=3, input_pos=4, output=5, scratch=6),
            Scalars(scale=0.125, softcap=30.0, sliding_window=512),
            7,
        )
    ]


def test_what_fails_while_running_is_in_the_log(library: TensorRTLibrary) -> None:
    plugin = create(library, SCALAR_FIELDS, "BUILD")
    with pytest.raises(EngineError):
        plugin.enqueue([], [], [], [], 0, 0)  # before any kernels were compiled
    assert (
        "running the plugin GemmaAttention: the engine's attention kernels are not in a format"
        in (library.log.take_errors())
    )

"""Graphs of other lowerings on ONNX Runtime, from their files and from memory."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.errors import BundleError, SessionError, UnsafePathError
from gemma_deploy.graph_spec import PHASES, Phase, graph_spec
from gemma_deploy.runtime.cache_buffers import CacheBuffers
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.onnxruntime_graph import GraphSource, OnnxRuntimeGraph
from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession
from tests.rounding import MODEL_FLOAT32, assert_near

CPU = Device(kind="cpu")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    """One with portable graphs too."""
    return Bundle.open(tiny_bundle("gemma2"))


def sources(bundle: Bundle) -> dict[Phase, GraphSource]:
    return {phase: GraphSource.of(bundle, phase, "portable") for phase in PHASES}


def logits(session: OnnxRuntimeSession) -> np.ndarray:
    """Read 6 tokens of two rows, then 5 more at positions 6 and 3, then one of each."""
    tokens = np.random.default_rng(0).integers(8, 512, (2, 12))
    cache = session.new_cache(2, 16)
    found = []
    for start, width in (([0, 0], 6), ([6, 3], 5), ([11, 8], 1)):
        pos = np.array(start)
        ids = np.take_along_axis(tokens, pos[:, None] + np.arange(width), axis=1)
        index = np.tile(np.arange(width), (2, 1))
        found.append(np.array(session.step(ids, pos, index, cache).logits))
    return np.concatenate(found, axis=1)


def test_graphs_of_another_lowering_give_the_same_logits(bundle: Bundle) -> None:
    """They continue several rows at once, where the bundle's own take one at a time."""
    with OnnxRuntimeSession(bundle, device=CPU, threads=1) as session:
        wanted = logits(session)
    with OnnxRuntimeSession(
        bundle, device=CPU, threads=1, use_decode_graph=True, graphs=sources(bundle)
    ) as session:
        assert_near(logits(session), wanted, roundings=MODEL_FLOAT32)


def test_a_model_in_memory_reads_the_weights_beside_its_file(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the program was started."""
    monkeypatch.chdir(tmp_path)
    own = sources(bundle)["decode"]
    source = GraphSource(path=own.path, spec=own.spec, model=own.path.read_bytes())
    assert OnnxRuntimeGraph(source, CPU, 1).device == CPU


class CountingBinding:
    """A binding that notes the inputs that are bound."""

    def __init__(self, binding: Any) -> None:
        self._binding = binding
        self.bound: list[str] = []

    def bind_input(self, name: str, *place: Any) -> None:
        self.bound.append(name)
        self._binding.bind_input(name, *place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._binding, name)


def decode(
    graph: OnnxRuntimeGraph, cache: CacheBuffers, token_ids: list[int], pos: int
) -> np.ndarray:
    """Run one token of each row and return its logits."""
    rows = len(token_ids)
    place = np.full(rows, pos), np.zeros((rows, 1), np.int64)
    return graph.run(np.array(token_ids)[:, None], *place, cache).copy()


@pytest.fixture
def counted(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> tuple[OnnxRuntimeSession, OnnxRuntimeGraph, CountingBinding]:
    """Return a session, its graph and the graph's binding."""
    session = OnnxRuntimeSession(bundle, device=CPU, threads=1)
    graph = session._prefill
    binding = CountingBinding(graph._binding)
    monkeypatch.setattr(graph, "_binding", binding)
    return session, graph, binding


TOKEN_INPUTS = ["input_ids", "input_pos", "logits_index"]


def test_token_inputs_are_bound_once_for_steps_of_one_shape(
    bundle: Bundle, counted: tuple[OnnxRuntimeSession, OnnxRuntimeGraph, CountingBinding]
) -> None:
    session, graph, binding = counted
    with session, OnnxRuntimeSession(bundle, device=CPU, threads=1) as other:
        cache, others = session.new_cache(1, 16), other.new_cache(1, 16)
        for pos, token_id in enumerate([9, 8, 7, 300]):
            found = decode(graph, cache, [token_id], pos)
            # Bound to fresh memory at every step.
            other._prefill._bound_inputs.clear()
            wanted = decode(other._prefill, others, [token_id], pos)
            np.testing.assert_array_equal(found, wanted)
        assert [x for x in binding.bound if x in TOKEN_INPUTS] == TOKEN_INPUTS


def test_what_is_bound_is_the_graph_s_own(
    counted: tuple[OnnxRuntimeSession, OnnxRuntimeGraph, CountingBinding],
) -> None:
    """The caller may change its arrays, and give such as lie in memory in another way."""
    session, graph, _ = counted
    with session:
        cache = session.new_cache(2, 16)
        first, second = decode(graph, cache, [9, 8], 0), decode(graph, cache, [7, 300], 1)
        cache = session.new_cache(2, 16)
        for pos, (tokens, wanted) in enumerate([([9, 8], first), ([7, 300], second)]):
            wide = np.array([[x, 5, 5] for x in tokens])
            ids, place = wide[:, :1], np.array([pos, -1, pos, -1])[::2]
            found = graph.run(ids, place, np.zeros((2, 1), np.int64), cache)
            np.testing.assert_array_equal(found, wanted)
            wide[:] = 5


def test_another_shape_or_cache_is_bound_anew(
    counted: tuple[OnnxRuntimeSession, OnnxRuntimeGraph, CountingBinding],
) -> None:
    session, graph, binding = counted
    with session:
        cache = session.new_cache(2, 16)
        wanted = decode(graph, cache, [9, 8], 0)
        alone = decode(graph, cache.rows(1, 2), [8], 0)
        assert_near(alone, wanted[1:], roundings=MODEL_FLOAT32)  # kernels of another shape
        cache = session.new_cache(2, 16)
        np.testing.assert_array_equal(decode(graph, cache, [9, 8], 0), wanted)
        assert [x for x in binding.bound if x in TOKEN_INPUTS] == TOKEN_INPUTS * 3


def test_inputs_of_another_device_are_bound_at_every_step(
    counted: tuple[OnnxRuntimeSession, OnnxRuntimeGraph, CountingBinding],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ONNX Runtime copies them there when they are bound."""
    session, graph, binding = counted
    with session:
        cache = session.new_cache(1, 16)
        decode(graph, cache, [9], 0)
        binding.bound.clear()
        monkeypatch.setattr(graph, "device", Device(kind="cuda"))
        for pos in (1, 2):
            decode(graph, cache, [8], pos)
        assert binding.bound == TOKEN_INPUTS * 2


def test_external_data_outside_of_the_bundle(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    path = folder / "decode.portable.onnx"
    model = onnx.load(path, load_external_data=False)
    entry = next(x for w in model.graph.initializer for x in w.external_data if x.key == "location")
    entry.value = "../weights.safetensors"
    path.write_bytes(model.SerializeToString())
    manifest = Bundle.open(bundle.folder).manifest
    with pytest.raises(UnsafePathError, match="leads out of the bundle"):
        GraphSource.of(Bundle(folder=folder, manifest=manifest), "decode", "portable")


def test_a_graph_of_another_shape(bundle: Bundle) -> None:
    own = sources(bundle)
    mixed = GraphSource(path=own["decode"].path, spec=own["prefill"].spec)
    with pytest.raises(
        BundleError, match=r"decode.portable.onnx has the inputs .*: export the bun"
    ):
        OnnxRuntimeGraph(mixed, CPU, 1)


def test_a_graph_of_another_dtype(bundle: Bundle) -> None:
    own = sources(bundle)["decode"]
    spec = graph_spec(bundle.config, "decode", "float16")
    message = "decode.portable.onnx: past_key_values.0.key is tensor(float)"
    with pytest.raises(BundleError, match=re.escape(message)):
        OnnxRuntimeGraph(GraphSource(path=own.path, spec=spec), CPU, 1)


def test_a_model_in_memory_that_cannot_be_loaded(bundle: Bundle) -> None:
    own = sources(bundle)["decode"]
    source = GraphSource(path=own.path, spec=own.spec, model=b"nothing of the kind")
    with pytest.raises(SessionError, match=r"cannot load .*decode.portable.onnx"):
        OnnxRuntimeGraph(source, CPU, 1)

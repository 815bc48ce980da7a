"""Graphs of other lowerings on ONNX Runtime, from their files and from memory."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.errors import BundleError, SessionError, UnsafePathError
from gemma_deploy.graph_spec import PHASES, Phase, graph_spec
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.onnxruntime_graph import GraphSource, OnnxRuntimeGraph
from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession

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
        # Float32 sums in another order.
        np.testing.assert_allclose(logits(session), wanted, atol=2e-4)


def test_a_model_in_memory_reads_the_weights_beside_its_file(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the program was started."""
    monkeypatch.chdir(tmp_path)
    own = sources(bundle)["decode"]
    source = GraphSource(path=own.path, spec=own.spec, model=own.path.read_bytes())
    assert OnnxRuntimeGraph(source, CPU, 1).device == CPU


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

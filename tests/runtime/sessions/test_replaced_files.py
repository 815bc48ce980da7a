"""Models whose files are replaced or changed while they are loaded, and after."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.engine import EngineFolder
from gemma_deploy.errors import BundleError, CheckpointError, EngineError, SessionError
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions import prepacked_cache
from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession
from gemma_deploy.runtime.sessions.prepacked_cache import PrepackedCache
from gemma_deploy.runtime.sessions.registry import create_session
from gemma_deploy.runtime.sessions.torch_session import TorchSession
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.text_generator import TextGenerator
from gemma_deploy.tokenizer import GemmaTokenizer

CPU = Device(kind="cpu")
NAME = "gemma1"


@pytest.fixture
def bundle(text_bundle: Any, tmp_path: Path) -> Path:
    """A bundle to replace."""
    shutil.copytree(text_bundle(NAME), tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def checkpoint(text_checkpoint: Any, tmp_path: Path) -> Path:
    shutil.copytree(text_checkpoint(NAME), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def replace(folder: Path) -> None:
    """Replace a folder by its like, as exports do."""
    shutil.copytree(folder, folder.with_name("new"))
    folder.rename(folder.with_name("old"))
    folder.with_name("new").rename(folder)


def afterwards(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], object]
) -> None:
    """Act once, when a function has returned."""
    original = getattr(owner, name)

    def replacement(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        monkeypatch.setattr(owner, name, original)
        act()
        return result

    monkeypatch.setattr(owner, name, replacement)


def step(session: Any) -> Any:
    cache = session.new_cache(1, 8)
    zero = np.zeros((1, 1), np.int64)
    return session.step(zero + 5, zero[0], zero, cache).logits


@pytest.mark.parametrize(
    ("owner", "name"), [(ort, "InferenceSession"), (GemmaTokenizer, "from_pretrained")]
)
def test_a_bundle_replaced_while_it_is_loaded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    source = ModelSource.open(bundle)
    afterwards(monkeypatch, owner, name, lambda: replace(bundle))
    with pytest.raises(BundleError, match="bundle was replaced or changed while the"):
        TextGenerator.open(source, device="cpu", threads=1)
    with TextGenerator.open(ModelSource.open(bundle), device="cpu", threads=1):
        pass


def test_a_bundle_replaced_before_its_graphs_are_read(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    replace(bundle)
    with pytest.raises(
        BundleError, match="was replaced or changed while the bundle was being load"
    ):
        OnnxRuntimeSession(opened, device=CPU, threads=1)


def test_a_checkpoint_replaced_while_it_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource.open(checkpoint)
    replace(checkpoint)
    with pytest.raises(CheckpointError, match="checkpoint was replaced or changed while the model"):
        create_session(source, device="cpu")
    weights = checkpoint / "model.safetensors"
    afterwards(monkeypatch, TorchSession, "_set_threads", lambda: os.utime(weights))
    source = ModelSource.open(checkpoint)
    with pytest.raises(CheckpointError, match=r"model.safetensors was replaced or changed"):
        create_session(source, device="cpu")


def test_an_engine_replaced_while_it_is_loaded(packed_engine: Path, tmp_path: Path) -> None:
    shutil.copytree(packed_engine, tmp_path / "engine")
    engine, source = EngineFolder.open(tmp_path / "engine"), ModelSource.open(tmp_path / "engine")
    engine.check_unchanged()
    source.check_unchanged()
    replace(tmp_path / "engine")
    for opened in (engine, source):
        with pytest.raises(EngineError, match="engine was replaced or changed while the"):
            opened.check_unchanged()


def test_what_was_packed_of_another_bundle_is_not_kept(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be kept under the hash of these weights, for good."""
    monkeypatch.setattr(prepacked_cache, "_FREE_SPACE_RESERVE", 0)
    cache = PrepackedCache(folder=tmp_path / "cache")
    opened = Bundle.open(bundle)
    replace(bundle)
    with pytest.raises(
        BundleError, match="replaced or changed while its weights were being packed"
    ):
        OnnxRuntimeSession(opened, device=CPU, threads=1, prepacked_cache=cache)
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("is_prepacked", [False, True])
@pytest.mark.parametrize("size_bytes", [0, None])
def test_mapped_weights_that_are_changed_in_place(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_prepacked: bool,
    size_bytes: int | None,
) -> None:
    """Cut off, they kill the process at the next step; written over, they are half of each."""
    monkeypatch.setattr(prepacked_cache, "_FREE_SPACE_RESERVE", 0)
    cache = PrepackedCache(folder=tmp_path / "cache") if is_prepacked else None
    for _ in range(1 + is_prepacked):  # made at first, found then
        session = OnnxRuntimeSession(
            Bundle.open(bundle), device=CPU, threads=1, prepacked_cache=cache
        )
        step(session)
        file = next(tmp_path.glob("cache/*/weights.bin"), bundle / "weights.safetensors")
        content, stat = file.read_bytes(), file.stat()
        if size_bytes is None:
            file.write_bytes(bytes(len(content)))
        else:
            os.truncate(file, size_bytes)
        with pytest.raises(SessionError, match=f"{file.name} was changed in place after the model"):
            step(session)
        session.close()
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_loaded_bundle_that_is_replaced_runs_on(bundle: Path) -> None:
    with OnnxRuntimeSession(Bundle.open(bundle), device=CPU, threads=1) as session:
        before = step(session).copy()
        replace(bundle)
        shutil.rmtree(bundle.with_name("old"))
        assert np.array_equal(step(session), before)


def test_torch_has_read_all_there_is(checkpoint: Path) -> None:
    """Nothing is mapped: what becomes of the file is no matter."""
    with TorchSession(checkpoint, device=CPU, threads=1) as session:
        before = step(session).numpy().copy()
        os.truncate(checkpoint / "model.safetensors", 0)
        assert np.array_equal(step(session).numpy(), before)

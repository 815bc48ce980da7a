"""Graphs loaded through the cache, by ONNX Runtime itself."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.errors import GemmaDeployWarning
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.exporters.quantization.options import QuantizationOptions
from gemma_deploy.file_records import sha256_of
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions import prepacked_graph
from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession
from gemma_deploy.runtime.sessions.prepacked_cache import (
    DATA_FILE,
    ENTRY_FILE,
    MODEL_FILE,
    PrepackedCache,
)
from gemma_deploy.staging import locked

PROMPT = np.array([[5, 300, 17, 44, 8, 9, 250]])
SCHEMES = ("float32", "int4", "int8")


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[[str], Path],
    text_bundle: Callable[[str], Path],
) -> Callable[[str], Bundle]:
    """Return bundles by what their matrices are stored in; not to be changed."""
    bundles = {"float32": Bundle.open(text_bundle("gemma1"))}

    def get(scheme: Any) -> Bundle:
        if scheme not in bundles:
            bundles[scheme] = export_checkpoint(
                tiny_checkpoint("gemma1"),
                tmp_path_factory.mktemp("exported") / scheme,
                quantization=QuantizationOptions(scheme=scheme, method="rtn"),
                graphs=("onnxruntime",),
                is_calibrated=False,
            )
        return bundles[scheme]

    return get


@pytest.fixture
def bundle(exported: Callable[[str], Bundle]) -> Bundle:
    return exported("int4")


@pytest.fixture
def cache(tmp_path: Path) -> PrepackedCache:
    return PrepackedCache(folder=tmp_path / "prepacked")


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the folders that are packed into from now on."""
    folders: list[Path] = []
    original = prepacked_graph._pack

    def pack(graph: Path, spec: Any, snapshot: Any, folder: Path, threads: int | None) -> Any:
        folders.append(folder)
        return original(graph, spec, snapshot, folder, threads)

    monkeypatch.setattr(prepacked_graph, "_pack", pack)
    return folders


def logits(bundle: Bundle, cache: PrepackedCache | None, **options: Any) -> Any:
    """Return the logits after a prompt, and after one token more: float32 [2, 1, V]."""
    session = OnnxRuntimeSession(
        bundle, device=Device(kind="cpu"), threads=1, prepacked_cache=cache, **options
    )
    with session:
        kv_cache = session.new_cache(1, 16)
        start, length = np.array([0]), PROMPT.shape[1]
        last = np.array([[length - 1]])
        first = session.step(PROMPT, start, last, kv_cache).logits[:, 0].copy()
        token, index = np.array([[int(first.argmax())]]), np.array([[0]])
        second = session.step(token, start + length, index, kv_cache).logits[:, 0].copy()
    return np.stack([first, second])


def only_entry(cache: PrepackedCache) -> Path:
    (entry,) = cache.entries()
    return entry.folder


def blobs(folder: Path) -> list[tuple[int, int]]:
    """Return offset and length of what ONNX Runtime packed."""
    model = onnx.load(folder / MODEL_FILE, load_external_data=False)
    values = [
        item.value
        for tensor in model.graph.initializer
        for item in tensor.external_data
        if item.key.startswith("prepacked_")
    ]
    parts = [value.split("|")[1].split(";") for value in values]
    return [(int(offset), int(length)) for offset, length, _ in parts]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_the_same_without_at_first_and_later(
    scheme: str, exported: Callable[[str], Bundle], cache: PrepackedCache, packed: list[Path]
) -> None:
    bundle = exported(scheme)
    expected = logits(bundle, None)
    for _ in range(3):
        assert np.array_equal(logits(bundle, cache), expected)
    assert len(packed) == 1
    assert blobs(only_entry(cache))


def test_the_decode_graph_is_kept_too(bundle: Bundle, cache: PrepackedCache) -> None:
    expected = logits(bundle, None, use_decode_graph=True)
    for _ in range(2):
        assert np.array_equal(logits(bundle, cache, use_decode_graph=True), expected)
    sources = {Path(entry.source) for entry in cache.entries()}
    assert sources == {bundle.graph_path("prefill"), bundle.graph_path("decode")}


def test_what_is_kept_is_what_is_multiplied_with(bundle: Bundle, cache: PrepackedCache) -> None:
    """Else it would only look as if packed weights were mapped."""
    expected = logits(bundle, cache)
    folder = only_entry(cache)
    stat = (folder / DATA_FILE).stat()
    with (folder / DATA_FILE).open("r+b") as file:
        for offset, length in blobs(folder):
            file.seek(offset)
            file.write(bytes(length))
    os.utime(folder / DATA_FILE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not np.array_equal(logits(bundle, cache), expected)


def test_other_weights_cpus_and_versions_have_entries_of_their_own(
    bundle: Bundle,
    exported: Callable[[str], Bundle],
    cache: PrepackedCache,
    packed: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = logits(bundle, cache)
    logits(exported("int8"), cache)
    assert len(packed) == 2
    monkeypatch.setattr(prepacked_graph, "read_cpu", lambda: ("another", ("avx2",)))
    assert np.array_equal(logits(bundle, cache), expected)
    assert len(packed) == 3
    monkeypatch.setattr(ort, "__version__", "9.9.9")
    assert np.array_equal(logits(bundle, cache), expected)
    assert len(packed) == len(cache.entries()) == 4


@pytest.mark.parametrize("name", [DATA_FILE, MODEL_FILE, ENTRY_FILE])
def test_damaged_files_are_made_again(
    name: str, bundle: Bundle, cache: PrepackedCache, packed: list[Path]
) -> None:
    expected = logits(bundle, cache)
    path = only_entry(cache) / name
    path.write_bytes(path.read_bytes()[:-100])
    for _ in range(2):
        assert np.array_equal(logits(bundle, cache), expected)
    assert len(packed) == 2


def test_a_model_that_cannot_be_loaded_is_made_again(
    bundle: Bundle, cache: PrepackedCache, packed: list[Path]
) -> None:
    expected = logits(bundle, cache)
    folder = only_entry(cache)
    before = sha256_of(folder / MODEL_FILE)
    (folder / MODEL_FILE).write_bytes(b"no model")
    record = folder / ENTRY_FILE
    record.write_text(record.read_text().replace(before, sha256_of(folder / MODEL_FILE)))
    assert np.array_equal(logits(bundle, cache), expected)
    assert len(packed) == 2
    assert sha256_of(only_entry(cache) / MODEL_FILE) == before


def test_what_computes_something_else_is_not_kept(
    bundle: Bundle,
    cache: PrepackedCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def spoil(_model_file: Path, data: Path) -> None:
        data.write_bytes(bytes(data.stat().st_size))

    monkeypatch.setattr(prepacked_graph, "align_blobs", spoil)
    assert np.array_equal(logits(bundle, cache), logits(bundle, None))
    assert cache.entries() == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "is loaded without prepacked weights: ONNX Runtime" in record.getMessage()
    assert "computes other logits from packed weights" in record.getMessage()


def test_a_folder_that_cannot_be_written_is_one_warning(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = PrepackedCache(folder=tmp_path / "file" / "cache")
    assert np.array_equal(logits(bundle, cache), logits(bundle, None))
    (record,) = caplog.records
    assert "prefill.onnx is loaded without prepacked weights" in record.getMessage()
    assert "cannot be written" in record.getMessage()


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder that everybody may read; while the test runs, root is not root."""
    # Not below tmp_path, whose parents only their owner may pass.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
        os.seteuid(os.getuid())
        for folder in Path(name).iterdir():
            folder.chmod(0o755)


def test_a_folder_that_can_only_be_read_serves(
    bundle: Bundle, nobody: Path, packed: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    copy = Bundle.open(Path(shutil.copytree(bundle.folder, nobody / "bundle")))
    cache = PrepackedCache(folder=nobody / "prepacked")
    expected = logits(copy, cache)
    cache.folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    assert np.array_equal(logits(copy, cache), expected)
    assert len(packed) == 1
    assert not caplog.records
    # What is not there yet cannot be written.
    assert np.array_equal(logits(copy, cache, use_decode_graph=True), expected)
    (record,) = caplog.records
    assert "decode.onnx is loaded without prepacked weights" in record.getMessage()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_that_others_can_change_is_not_used(
    bundle: Bundle,
    cache: PrepackedCache,
    packed: list[Path],
    is_there: bool,
) -> None:
    expected = logits(bundle, cache if is_there else None)
    packed.clear()
    cache.folder.mkdir(exist_ok=True)
    cache.folder.chmod(0o777)
    message = r"without prepacked weights: .*prepacked may be written by other users \(mode 777\)"
    with pytest.warns(GemmaDeployWarning, match=message):
        assert np.array_equal(logits(bundle, cache), expected)
    assert packed == []
    assert len(list(cache.folder.iterdir())) == is_there


def test_who_finds_another_writing_runs_without(
    bundle: Bundle, cache: PrepackedCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.folder.mkdir()
    with locked(cache.folder):
        assert np.array_equal(logits(bundle, cache), logits(bundle, None))
    assert cache.entries() == []
    assert not caplog.records


def test_two_processes_at_once(bundle: Bundle, cache: PrepackedCache, packed: list[Path]) -> None:
    code = (
        "import sys, gemma_deploy\n"
        "from gemma_deploy.bundle import Bundle\n"
        "from gemma_deploy.runtime.devices import Device\n"
        "from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession\n"
        "from gemma_deploy.runtime.sessions.prepacked_cache import PrepackedCache\n"
        "from pathlib import Path\n"
        "bundle, folder = map(Path, sys.argv[1:])\n"
        "cache = PrepackedCache(folder=folder)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "OnnxRuntimeSession(Bundle.open(bundle), device=Device(kind='cpu'), prepacked_cache=cache)\n"
    )
    command = [sys.executable, "-c", code, str(bundle.folder), str(cache.folder)]
    processes = [
        subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60) for process in processes]
    assert said == [("", ""), ("", "")]
    assert [process.returncode for process in processes] == [0, 0]
    assert [path.name for path in cache.folder.iterdir()] == [only_entry(cache).name]
    assert np.array_equal(logits(bundle, cache), logits(bundle, None))
    assert not packed

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from gemma_deploy.errors import BundleError, GemmaDeployError, RequestError, TokenizerError
from gemma_deploy.runtime.opening import open_model
from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.tokenizer import GemmaTokenizer

Spoil = Callable[[str, bytes, bytes], object]
TOKENIZER = ("tokenizer.json", b'"BPE"', b'"BPX"')
GRAPH = ("prefill.onnx", b"GroupQueryAttention", b"GroupQueryAttentioX")


@pytest.fixture
def bundle(text_bundle: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_bundle("gemma1"), tmp_path / "bundle"))


@pytest.fixture
def spoil(bundle: Path) -> Spoil:
    """Damage a file and leave its size, so that only who reads it sees it."""

    def replace(name: str, old: bytes, new: bytes) -> None:
        content = (bundle / name).read_bytes()
        assert old in content
        (bundle / name).write_bytes(content.replace(old, new))

    return replace


def test_the_tokenizer_is_read_while_the_graph_is_loaded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_reading, was_reading = threading.Event(), []
    read, load = GemmaTokenizer.from_pretrained, ort.InferenceSession

    def reading(folder: Path) -> GemmaTokenizer:
        is_reading.set()
        return read(folder)

    def loading(*args: Any, **options: Any) -> Any:
        was_reading.append(is_reading.wait(30))
        return load(*args, **options)

    monkeypatch.setattr(GemmaTokenizer, "from_pretrained", reading)
    monkeypatch.setattr(ort, "InferenceSession", loading)
    session, tokenizer = open_model(ModelSource.open(bundle), device="cpu", threads=1)
    session.close()
    assert was_reading == [True]
    assert tokenizer.encode("The for") == read(bundle).encode("The for")


@pytest.mark.parametrize(
    ("damages", "options", "error"),
    [
        ([TOKENIZER], {}, TokenizerError),
        ([GRAPH], {}, BundleError),
        ([TOKENIZER, GRAPH], {}, TokenizerError),
        ([TOKENIZER], {"threads": 100_000}, TokenizerError),
        ([], {"threads": 100_000}, RequestError),
        ([TOKENIZER], {"backend": "none"}, TokenizerError),
        ([], {"backend": "none"}, RequestError),
    ],
)
def test_the_tokenizers_error_comes_first_and_nothing_is_left(
    bundle: Path,
    spoil: Spoil,
    monkeypatch: pytest.MonkeyPatch,
    damages: list[tuple[str, bytes, bytes]],
    options: dict[str, Any],
    error: type[GemmaDeployError],
) -> None:
    opened: list[OnnxRuntimeSession] = []
    closed: list[OnnxRuntimeSession] = []
    initialize, close = OnnxRuntimeSession.__init__, OnnxRuntimeSession.close

    def counted(self: OnnxRuntimeSession, *args: Any, **keywords: Any) -> None:
        initialize(self, *args, **keywords)
        opened.append(self)

    def counted_too(self: OnnxRuntimeSession) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(OnnxRuntimeSession, "__init__", counted)
    monkeypatch.setattr(OnnxRuntimeSession, "close", counted_too)
    for damage in damages:
        spoil(*damage)
    source, threads = ModelSource.open(bundle), threading.active_count()
    with pytest.raises(error):
        open_model(source, **{"device": "cpu", "threads": 1, **options})
    assert closed == opened
    assert threading.active_count() == threads


def test_other_backends_load_no_model_for_a_broken_tokenizer(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "samples" / "tiny-gemma"
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError):  # there are no weights either
        open_model(ModelSource.open(tmp_path))

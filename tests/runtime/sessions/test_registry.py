import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.errors import BackendUnavailableError, RequestError
from gemma_deploy.runtime.sessions.registry import create_session
from gemma_deploy.runtime.source import ModelSource


def test_auto_takes_what_the_folder_is_for(text_bundle: Any, text_checkpoint: Any) -> None:
    for folder, expected in (
        (text_bundle("gemma1"), "OnnxRuntimeSession"),
        (text_checkpoint("gemma1"), "TorchSession"),
    ):
        session = create_session(ModelSource.open(folder), device="cpu", threads=1)
        assert type(session).__name__ == expected
        session.close()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (
            "bundle",
            {"backend": "tensorflow"},
            "backend is 'tensorflow'; expected auto, onnxruntime, tensorrt, tensorrt-rtx, torch",
        ),
        ("bundle", {"threads": 0}, "threads is 0; it must be at least 1"),
        ("bundle", {"device": "gpu"}, "device is 'gpu'"),
        ("bundle", {"backend": "torch"}, "is a bundle; the torch backend runs checkpoints"),
        ("checkpoint", {"backend": "onnxruntime"}, "gemma-deploy export .* --output BUNDLE"),
    ],
)
def test_what_cannot_be_is_refused(
    kind: str, arguments: Any, message: str, text_bundle: Any, text_checkpoint: Any
) -> None:
    folder: Path = (text_bundle if kind == "bundle" else text_checkpoint)("gemma1")
    with pytest.raises(RequestError, match=message):
        create_session(ModelSource.open(folder), **arguments)


@pytest.mark.parametrize(
    ("module", "fixture", "message"),
    [
        ("onnxruntime_session", "text_bundle", "pip install onnxruntime-gpu"),
        ("torch_session", "text_checkpoint", "pip install torch"),
    ],
)
def test_a_missing_package_names_what_to_install(
    module: str, fixture: str, message: str, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(fixture)("gemma1")
    monkeypatch.setitem(sys.modules, f"gemma_deploy.runtime.sessions.{module}", None)
    with pytest.raises(BackendUnavailableError, match=message):
        create_session(ModelSource.open(folder))

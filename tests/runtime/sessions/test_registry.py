import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.cuda_driver import cuda_device_count
from gemma_deploy.errors import BackendUnavailableError, BundleError, RequestError
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


@pytest.mark.skipif(cuda_device_count() > 0, reason="there is a GPU")
def test_auto_is_the_flavour_of_a_packed_engine(packed_engine: Path) -> None:
    source = ModelSource.open(packed_engine)
    with pytest.raises(BackendUnavailableError, match="the tensorrt-rtx backend cannot run here"):
        create_session(source)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("onnxruntime", "is an engine for tensorrt-rtx; the onnxruntime backend runs bundles"),
        ("torch", "is an engine for tensorrt-rtx; .* use the backend tensorrt-rtx"),
        ("tensorrt", "is an engine for tensorrt-rtx; it cannot be run by the tensorrt backend"),
    ],
)
def test_a_packed_engine_runs_on_its_own_library_only(
    backend: str, message: str, packed_engine: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        create_session(ModelSource.open(packed_engine), backend=backend)


def test_an_engine_must_be_built_first(text_bundle: Any, text_checkpoint: Any) -> None:
    bundle, checkpoint = text_bundle("gemma1"), text_checkpoint("gemma1")
    with pytest.raises(BundleError, match="float32 and has no tensorrt graphs"):
        create_session(ModelSource.open(bundle), backend="tensorrt-rtx")
    with pytest.raises(RequestError, match=r"gemma-deploy export .*gemma-deploy build BUNDLE"):
        create_session(ModelSource.open(checkpoint), backend="tensorrt-rtx")
    with pytest.raises(
        RequestError, match="tensorrt-rtx backend runs on NVIDIA GPUs; device is cpu"
    ):
        create_session(ModelSource.open(bundle), backend="tensorrt-rtx", device="cpu")

from typing import Any

import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state

from gemma_deploy.bundle import Bundle
from gemma_deploy.cuda_driver import cuda_device_count
from gemma_deploy.errors import BackendUnavailableError
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions import onnxruntime_providers
from gemma_deploy.runtime.sessions.onnxruntime_providers import (
    ORT_ERRORS,
    create_inference_session,
)

HAS_CUDA_BUILD = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.fixture
def graph(text_bundle: Any) -> Any:
    return Bundle.open(text_bundle("gemma1")).graph_path("prefill")


@pytest.mark.parametrize("kind", ["cpu", "auto"])
def test_without_a_driver_it_runs_on_the_cpu_and_says_nothing(
    kind: Any, graph: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime_providers, "cuda_device_count", lambda: 0)
    session, device = create_inference_session(graph, Device(kind=kind), 1)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert device == Device(kind="cpu")
    assert session.get_session_options().intra_op_num_threads == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("count", "found"), [(0, "no NVIDIA driver or CUDA device"), (1, r"1 CUDA device\(s\)")]
)
@pytest.mark.skipif(not HAS_CUDA_BUILD, reason="this onnxruntime has no CUDA in it")
def test_cuda_without_the_device_is_refused(
    count: int, found: str, graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_providers, "cuda_device_count", lambda: count)
    message = f"cuda:1 is not on this machine: {found} found.*CUDA 13 and cuDNN 9"
    with pytest.raises(BackendUnavailableError, match=message):
        create_inference_session(graph, Device(kind="cuda", index=1), None)


def test_a_build_without_cuda_is_refused(graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    message = r"built without CUDA \(it has CPUExecutionProvider\): pip install onnxruntime-gpu"
    with pytest.raises(BackendUnavailableError, match=message):
        create_inference_session(graph, Device(kind="cuda"), None)
    _, device = create_inference_session(graph, Device(kind="auto"), 1)
    assert device == Device(kind="cpu")


@pytest.mark.skipif(
    not HAS_CUDA_BUILD or cuda_device_count() > 0,
    reason="needs an onnxruntime with CUDA in it, on a machine without",
)
def test_a_provider_that_does_not_start_is_not_taken_for_one(
    graph: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A driver without CUDA's libraries: ONNX Runtime itself falls back and raises nothing."""
    monkeypatch.setattr(onnxruntime_providers, "cuda_device_count", lambda: 1)
    session, device = create_inference_session(graph, Device(kind="auto"), 1)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert device == Device(kind="cpu")
    message = "could not start its CUDA provider and would run on CPUExecutionProvider: .*"
    with pytest.raises(BackendUnavailableError, match=message + "CUDA 13 and cuDNN 9: pip"):
        create_inference_session(graph, Device(kind="cuda"), 1)
    assert capfd.readouterr() == ("", "")


def test_every_error_of_onnx_runtime_is_known() -> None:
    """Some versions have more of them; a RuntimeError is what it raises besides."""
    for name in ("Fail", "NoSuchFile", "InvalidProtobuf", "ModelRequiresCompilation"):
        assert issubclass(getattr(onnxruntime_pybind11_state, name), ORT_ERRORS)
    assert not issubclass(KeyboardInterrupt, ORT_ERRORS)

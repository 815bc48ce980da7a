"""The session up to where a GPU is needed; tests/runtime/sessions/test_tensorrt_session_gpu.py goes on."""

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from gemma_deploy.cuda_driver import Gpu, cuda_device_count
from gemma_deploy.engine import EngineFolder
from gemma_deploy.errors import BackendUnavailableError, EngineError, RequestError
from gemma_deploy.runtime.cuda_device import CudaDevice
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions import tensorrt_session
from gemma_deploy.runtime.sessions.engine_step import StepOutputs
from gemma_deploy.runtime.sessions.registry import create_session
from gemma_deploy.runtime.sessions.tensorrt_session import TensorRTSession, _largest
from gemma_deploy.runtime.source import ModelSource

needs_no_driver = pytest.mark.skipif(cuda_device_count() > 0, reason="there is a GPU")
HOPPER = Gpu(name="H100", compute_capability=(9, 0), memory_bytes=80 << 30)


def test_importing_the_session_needs_only_what_a_device_has() -> None:
    program = """
import sys
import gemma_deploy.runtime.sessions.tensorrt_session
import gemma_deploy.runtime.sessions.registry
import gemma_deploy.runtime.text_generator
import gemma_deploy.plugins.attention
from gemma_deploy.tensorrt import load_library
gemma_deploy.plugins.attention.register_plugin(load_library("tensorrt-rtx"))
unwanted = ["torch", "triton", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "ml_dtypes", "cuda"]
print([name for name in unwanted if name in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_a_cpu_is_refused(text_engine: Any) -> None:
    with pytest.raises(RequestError, match="TensorRT engines run on NVIDIA GPUs; device is cpu"):
        TensorRTSession(text_engine(), device=Device(kind="cpu"))


@needs_no_driver
def test_a_machine_without_a_driver_says_so(text_engine: Any) -> None:
    engine = text_engine()
    message = "tensorrt-rtx backend cannot run here: no NVIDIA driver on this machine.*drivers"
    with pytest.raises(BackendUnavailableError, match=message):
        TensorRTSession(engine)
    bundle = ModelSource.open(engine.folder.parent.parent)
    with pytest.raises(BackendUnavailableError, match=message):
        create_session(bundle, backend="tensorrt-rtx")


@needs_no_driver
def test_the_drivers_bindings_without_a_driver() -> None:
    with pytest.raises(BackendUnavailableError, match="no NVIDIA driver on this machine"):
        CudaDevice(0)


def test_missing_bindings_name_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendUnavailableError, match=r'pip install "cuda-bindings>=12\.8"'):
        CudaDevice(0)


def test_an_engine_of_another_version_is_refused_before_a_gpu_is_looked_for(
    text_engine: Any,
) -> None:
    engine = with_build(text_engine(), library_version="1.4.0")
    with pytest.raises(
        EngineError, match=r"built with tensorrt-rtx 1.4.0, .* is installed.*`gemma-deploy build"
    ):
        TensorRTSession(engine)


def test_an_engine_for_other_gpus_is_refused(
    text_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_session, "require_gpu", lambda _flavour, _index: HOPPER)
    with pytest.raises(
        EngineError, match=r"compute capability 8.9, H100 has 9.0.*--compute-capability 9.0"
    ):
        TensorRTSession(text_engine())


def test_a_flavour_that_is_not_installed_names_what_to_install(text_engine: Any) -> None:
    with pytest.raises(BackendUnavailableError, match=r'pip install .*\[tensorrt\]"'):
        TensorRTSession(with_build(text_engine(), flavour="tensorrt"))


def test_a_position_with_a_logit_that_is_not_finite_is_not_finite() -> None:
    logits = np.array([[[3, 2]], [[5, 4]], [[7, 6]]], np.float32)
    sums = np.array([[10.0], [np.nan], [-np.inf]], np.float32)
    token_ids = np.array([[[8, 9]], [[1, 2]], [[4, 3]]])
    picked = {"top_logits": logits, "top_indices": token_ids, "logits_sum": sums}
    found = _largest(StepOutputs(picked=picked, logits=None))
    np.testing.assert_array_equal(found.token_ids, token_ids)
    np.testing.assert_array_equal(found.logits[0], [[3, 2]])
    assert np.isnan(found.logits[1:]).all()


def with_build(engine: EngineFolder, **fields: Any) -> EngineFolder:
    build = dataclasses.replace(engine.manifest.build, **fields)
    return dataclasses.replace(engine, manifest=dataclasses.replace(engine.manifest, build=build))

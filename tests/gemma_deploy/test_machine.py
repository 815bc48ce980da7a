import ctypes
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from gemma_deploy.errors import BackendUnavailableError
from gemma_deploy.machine import read_machine
from gemma_deploy.tensorrt import load_library


class TestThisMachine:
    def test_versions_are_those_of_the_modules(self) -> None:
        import onnx

        found = read_machine()

        assert found.packages["onnx"] == onnx.__version__
        assert found.packages["gemma-deploy"] == metadata.version("gemma-deploy")

    def test_the_cpu_provider_works(self) -> None:
        found = read_machine()

        assert "CPUExecutionProvider" in found.working_providers
        assert set(found.working_providers) <= set(found.compiled_providers)
        assert found.onnxruntime_error is None

    def test_torch_cuda_is_what_torch_says(self) -> None:
        import torch

        assert read_machine().torch_cuda == torch.version.cuda

    def test_tensorrt_is_imported_to_see_whether_it_can_be(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = read_machine()

        assert found.packages["tensorrt-rtx"] == load_library("tensorrt-rtx").version
        assert "tensorrt-rtx" not in found.tensorrt_errors
        assert found.tensorrt_cuda["tensorrt-rtx"] in {12, 13}

        def refuse(_flavour: str) -> None:
            raise BackendUnavailableError("libfoo.so is missing")

        monkeypatch.setattr("gemma_deploy.machine.load_library", refuse)

        assert read_machine().tensorrt_errors["tensorrt-rtx"] == "libfoo.so is missing"

    @pytest.mark.gpu
    def test_gpus_are_those_that_torch_sees(self) -> None:
        import torch

        assert len(read_machine().gpus) == torch.cuda.device_count()

    def test_loads_the_cuda_libraries_that_pip_installed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        called: list[str] = []
        create = ort.InferenceSession

        def recorded(*args: Any, **kwargs: Any) -> object:
            called.append("session")
            return create(*args, **kwargs)

        monkeypatch.setattr(ort, "preload_dlls", lambda: called.append("preload"))
        monkeypatch.setattr(ort, "InferenceSession", recorded)

        read_machine()

        assert called[:2] == ["preload", "session"]

    def test_prints_nothing(self, capfd: pytest.CaptureFixture[str]) -> None:
        read_machine()

        assert capfd.readouterr() == ("", "")


class TestWithout:
    def test_onnxruntime(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)

        found = read_machine()

        assert found.working_providers == ()
        assert found.onnxruntime_error is not None

    def test_onnx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)

        assert "CPUExecutionProvider" in read_machine().working_providers

    def test_half_of_onnxruntime(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))

        found = read_machine()

        assert found.working_providers == ()
        assert found.onnxruntime_error == "onnxruntime's files are incomplete"

    @pytest.mark.parametrize("error", [ort_errors.EPFail, ort_errors.Fail, RuntimeError])
    def test_a_provider_that_can_be_loaded(
        self, error: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create = ort.InferenceSession

        def refuse(model: bytes, options: object, *, providers: list[str]) -> object:
            if providers == ["BrokenExecutionProvider"]:
                raise error("no such device")
            return create(model, options, providers=providers)

        names = ["BrokenExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(ort, "get_available_providers", lambda: names)
        monkeypatch.setattr(ort, "InferenceSession", refuse)

        found = read_machine()

        assert found.compiled_providers == tuple(names)
        assert found.working_providers == ("CPUExecutionProvider",)

    def test_a_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(name: str) -> ctypes.CDLL:
            raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", refuse)

        assert read_machine().cuda_driver is None

    def test_a_device_behind_the_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: fake_driver(devices=0))

        found = read_machine()

        assert found.cuda_driver == "13.1"
        assert found.gpus == ()


class TestWithGpu:
    def test_reads_name_memory_and_capability(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda _: fake_driver(devices=2))

        gpus = read_machine().gpus

        assert [gpu.name for gpu in gpus] == ["Device 0", "Device 1"]
        assert gpus[1].compute_capability == (8, 9)
        assert gpus[1].memory_bytes == 24 << 30


def fake_driver(devices: int) -> SimpleNamespace:
    """Return the seven calls of libcuda that are made, answered as NVIDIA documents them."""

    def name(buffer: Any, _size: int, device: ctypes.c_int) -> int:
        buffer.value = f"Device {device.value}".encode()
        return 0

    return SimpleNamespace(
        cuInit=lambda _flags: 0,
        cuDriverGetVersion=lambda out: store(out, ctypes.c_int, 13010),
        cuDeviceGetCount=lambda out: store(out, ctypes.c_int, devices),
        cuDeviceGet=lambda out, ordinal: store(out, ctypes.c_int, ordinal),
        cuDeviceGetName=name,
        cuDeviceTotalMem_v2=lambda out, _device: store(out, ctypes.c_size_t, 24 << 30),
        cuDeviceGetAttribute=lambda out, key, _device: store(
            out, ctypes.c_int, {75: 8, 76: 9}[key]
        ),
    )


def store(reference: Any, kind: type[ctypes.c_int | ctypes.c_size_t], value: int) -> int:
    """Write through a `byref`, as the driver does, and report success."""
    ctypes.cast(reference, ctypes.POINTER(kind))[0] = value
    return 0

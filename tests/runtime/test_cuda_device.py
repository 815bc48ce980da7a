"""What is asked of the driver, which is played here: the tests on a GPU ask the real one."""

import enum
import gc
from collections.abc import Callable
from typing import Any

import pytest

from gemma_deploy.errors import SessionError
from gemma_deploy.runtime import cuda_device
from gemma_deploy.runtime.cuda_device import CudaDevice


class Result(enum.IntEnum):
    """The driver's results, with its own numbers."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class CUstream_flags(enum.IntEnum):  # noqa: N801 - the driver's name
    CU_STREAM_NON_BLOCKING = 1


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class Driver:
    """Notes every call; those named in `fails` fail, all others give the number 4096."""

    CUresult = Result
    CUstream_flags = CUstream_flags
    CUstreamCaptureMode = CUstreamCaptureMode

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails: dict[str, Result] = {}

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, int]]:
        def call(*_: object) -> tuple[Any, int]:
            self.calls.append(name)
            return self.fails.get(name, Result.CUDA_SUCCESS), 4096

        return call

    def cuGetErrorName(self, error: Result) -> tuple[Result, bytes]:  # noqa: N802 - the driver's name
        return Result.CUDA_SUCCESS, error.name.encode()

    def cuGetErrorString(self, _error: Result) -> tuple[Result, bytes]:  # noqa: N802 - the driver's name
        return Result.CUDA_SUCCESS, b"in its words"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(cuda_device, "_load_driver", lambda: driver)
    return driver


@pytest.fixture
def device(driver: Driver) -> CudaDevice:
    device = CudaDevice(0)
    driver.calls.clear()
    return device


def test_memory_is_zero_before_anybody_has_it_and_freed_once(
    device: CudaDevice, driver: Driver
) -> None:
    memory = device.allocate(10)
    assert (memory.address, memory.size_bytes) == (4096, 10)
    assert driver.calls[-3:] == ["cuMemAlloc", "cuMemsetD8", "cuCtxSynchronize"]
    memory.free()
    memory.free()
    del memory
    gc.collect()
    assert driver.calls.count("cuMemFree") == 1
    pinned = device.allocate_pinned(10)
    del pinned
    gc.collect()
    assert driver.calls[-1] == "cuMemFreeHost"


def test_too_little_memory_is_told_from_other_failures(device: CudaDevice, driver: Driver) -> None:
    driver.fails["cuMemAlloc"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(MemoryError, match="cuMemAlloc: the GPU has not enough free memory"):
        device.allocate(10)
    driver.fails["cuMemAlloc"] = Result.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(
        SessionError,
        match=r"cuda:0 in cuMemAlloc: CUDA_ERROR_ILLEGAL_ADDRESS, in its words. .* started again",
    ):
        device.allocate(10)


def test_memory_that_could_not_be_cleared_is_given_back(device: CudaDevice, driver: Driver) -> None:
    driver.fails["cuMemsetD8"] = Result.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(SessionError, match="cuMemsetD8"):
        device.allocate(10)
    gc.collect()
    assert driver.calls[-1] == "cuMemFree"


def test_a_recording_is_launched_and_given_back(device: CudaDevice, driver: Driver) -> None:
    stream = device.create_stream()
    driver.calls.clear()
    graph = device.capture(stream, lambda: driver.calls.append("work"))
    graph.launch(stream)
    graph.free()
    assert driver.calls == [
        "cuStreamBeginCapture",
        "work",
        "cuStreamEndCapture",
        "cuGraphInstantiate",
        "cuGraphDestroy",
        "cuGraphLaunch",
        "cuCtxSetCurrent",
        "cuGraphExecDestroy",
    ]


def test_a_recording_that_fails_leaves_the_stream_usable(
    device: CudaDevice, driver: Driver
) -> None:
    stream = device.create_stream()
    driver.calls.clear()

    def fail() -> None:
        raise SessionError("the step failed")

    with pytest.raises(SessionError, match="the step failed"):
        device.capture(stream, fail)
    assert driver.calls == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy"]
    driver.fails["cuStreamEndCapture"] = Result.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(SessionError, match="cannot capture the step: CUDA_ERROR_ILLEGAL_ADDRESS"):
        device.capture(stream, lambda: None)

"""A GPU's memory, streams and graphs through the CUDA driver: `CudaDevice`.

https://docs.nvidia.com/cuda/cuda-driver-api. Nothing here has run on hardware yet.
"""

import weakref
from collections.abc import Callable
from typing import Any

from gemma_deploy.errors import BackendUnavailableError, SessionError


class CudaDevice:
    """One GPU.

    It is used through its primary context, the one that TensorRT and torch use too; that stays until
    the process ends, so that memory freed late, by the garbage collector, still has a context.

    Attributes:
        index: Number of the CUDA device.
    """

    def __init__(self, index: int) -> None:
        """Open a device, and make it the calling thread's.

        Raises:
            BackendUnavailableError: cuda-bindings or the driver is missing.
            SessionError: The driver refuses the device.
        """
        self.index = index
        self._driver = _load_driver()
        self.call("cuInit", 0)
        self._context = self.call("cuDevicePrimaryCtxRetain", self.call("cuDeviceGet", index))
        self.activate()

    def activate(self) -> None:
        """Make the device the calling thread's: CUDA and TensorRT work on the thread's device."""
        self.call("cuCtxSetCurrent", self._context)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver; return its result, or None.

        Raises:
            MemoryError: There is not enough memory on the device.
            SessionError: Any other failure, in the driver's words.
        """
        error, *results = getattr(self._driver, function)(*arguments)
        if error == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise MemoryError(f"{function}: the GPU has not enough free memory")
        if error != self._driver.CUresult.CUDA_SUCCESS:
            _, name = self._driver.cuGetErrorName(error)
            _, text = self._driver.cuGetErrorString(error)
            raise SessionError(
                f"CUDA failed on cuda:{self.index} in {function}: {_decoded(name)}, "
                f"{_decoded(text)}. After an illegal access the process must be started again; see "
                "`gemma-deploy doctor` for the driver"
            )
        return results[0] if results else None

    def allocate(self, size_bytes: int) -> "DeviceMemory":
        """Return zeroed memory on the device.

        Raises:
            MemoryError: There is not enough.
        """
        self.activate()
        address = int(self.call("cuMemAlloc", max(size_bytes, 1)))
        memory = DeviceMemory(address, size_bytes, self._release("cuMemFree", address))
        self.call("cuMemsetD8", address, 0, max(size_bytes, 1))
        # The streams made here do not wait for the default one, which the zeros are written on.
        self.call("cuCtxSynchronize")
        return memory

    def allocate_pinned(self, size_bytes: int) -> "PinnedMemory":
        """Return memory of the host that the device copies from and to while the host goes on.

        Raises:
            MemoryError: There is not enough.
        """
        self.activate()
        address = int(self.call("cuMemHostAlloc", max(size_bytes, 1), 0))
        return PinnedMemory(address, size_bytes, self._release("cuMemFreeHost", address))

    def create_stream(self) -> "Stream":
        """Return a stream that does not wait for the default one."""
        self.activate()
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        handle = self.call("cuStreamCreate", flags)
        return Stream(self, handle, self._release("cuStreamDestroy", handle))

    def free_bytes(self) -> int:
        """Return how much memory of the device nobody uses."""
        self.activate()
        return int(self.call("cuMemGetInfo"))

    def capture(self, stream: "Stream", work: Callable[[], object]) -> "CapturedGraph":
        """Record what `work` puts on a stream, without running it.

        Raises:
            SessionError: Something of it cannot be captured.
        """
        # Other threads may allocate meanwhile: only this one's calls are watched.
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", stream.handle, mode)
        try:
            work()
        except BaseException:
            # The capture ends however the work ended, or the stream could not be used again.
            error, graph = self._driver.cuStreamEndCapture(stream.handle)
            if error == self._driver.CUresult.CUDA_SUCCESS:
                self._driver.cuGraphDestroy(graph)
            raise
        error, graph = self._driver.cuStreamEndCapture(stream.handle)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise SessionError(f"CUDA on cuda:{self.index} cannot capture the step: {error.name}")
        try:
            instance = self.call("cuGraphInstantiate", graph, 0)
        finally:
            self._driver.cuGraphDestroy(graph)
        return CapturedGraph(self, instance, self._release("cuGraphExecDestroy", instance))

    def _release(self, function: str, handle: Any) -> Callable[[], None]:
        """Return what gives a handle back; it raises nothing, for it also runs at the very end."""
        driver, context = self._driver, self._context

        def release() -> None:
            driver.cuCtxSetCurrent(context)
            getattr(driver, function)(handle)

        return release


class _Owned:
    """Something of the driver's that is given back once: by `free`, or when nobody holds it."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._finalizer = weakref.finalize(self, release)

    def free(self) -> None:
        """Give it back now."""
        self._finalizer()


class DeviceMemory(_Owned):
    """Memory on the device.

    Attributes:
        address: Of its first byte.
        size_bytes: Its size.
    """

    def __init__(self, address: int, size_bytes: int, release: Callable[[], None]) -> None:
        super().__init__(release)
        self.address = address
        self.size_bytes = size_bytes


class PinnedMemory(_Owned):
    """Memory of the host; an array made of it keeps it.

    Attributes:
        address: Of its first byte.
        size_bytes: Its size.
    """

    def __init__(self, address: int, size_bytes: int, release: Callable[[], None]) -> None:
        super().__init__(release)
        self.address = address
        self.size_bytes = size_bytes

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The memory as bytes, for `numpy.asarray`."""
        return {
            "shape": (self.size_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }


class Stream(_Owned):
    """A queue of work on the device.

    Attributes:
        handle: The driver's; TensorRT takes it as an int.
    """

    def __init__(self, device: CudaDevice, handle: Any, release: Callable[[], None]) -> None:
        super().__init__(release)
        self._device = device
        self.handle = handle

    def copy_to_device(self, target: int, source: int, size_bytes: int) -> None:
        """Queue a copy from pinned memory."""
        self._device.call("cuMemcpyHtoDAsync", target, source, size_bytes, self.handle)

    def copy_to_host(self, target: int, source: int, size_bytes: int) -> None:
        """Queue a copy to pinned memory."""
        self._device.call("cuMemcpyDtoHAsync", target, source, size_bytes, self.handle)

    def synchronize(self) -> None:
        """Wait for everything queued.

        Raises:
            SessionError: Any of it failed.
        """
        self._device.call("cuStreamSynchronize", self.handle)


class CapturedGraph(_Owned):
    """Work that was recorded once, to be queued again with one call."""

    def __init__(self, device: CudaDevice, handle: Any, release: Callable[[], None]) -> None:
        super().__init__(release)
        self._device = device
        self._handle = handle

    def launch(self, stream: Stream) -> None:
        """Queue the work."""
        self._device.call("cuGraphLaunch", self._handle, stream.handle)


def _load_driver() -> Any:
    """Import the driver's bindings, and make sure that there is a driver."""
    try:
        from cuda.bindings import driver
    except ImportError as err:
        raise BackendUnavailableError(
            f"the TensorRT backends need the Python package cuda-bindings: {err}. "
            'pip install "cuda-bindings>=12.8"'
        ) from err
    try:
        driver.cuDriverGetVersion()
    except RuntimeError as err:  # pathfinder's DynamicLibNotFoundError is one
        raise BackendUnavailableError(
            "no NVIDIA driver on this machine; a GPU and its driver are needed: "
            f"https://www.nvidia.com/drivers ({err})"
        ) from err
    return driver


def _decoded(text: Any) -> str:
    return text.decode(errors="replace") if isinstance(text, bytes) else "unknown error"

"""Attention on the device, by the CUDA driver alone: `load_kernels`, `DeviceKernels.run`.

Neither torch nor Triton is needed. Has not run on hardware yet.
"""

import ctypes
import functools
from dataclasses import dataclass
from typing import Any, Final

from gemma_deploy.errors import BackendUnavailableError, SessionError
from gemma_deploy.plugins.attention.cubins import CompiledKernel, KernelArchive, KernelName
from gemma_deploy.plugins.attention.schedule import CallShape, Launch, plan_launch

_WARP_THREADS: Final = 32
_ALIGNMENT_BYTES: Final = 16  # what the kernels are compiled for
_STATIC_SHARED_BYTES: Final = 48 * 1024  # more has to be asked for
_POINTER, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_float, ctypes.c_int32
# Triton's kernels end in two pointers of its own: global and profiling scratch, which ours are
# compiled without. Versions whose kernels have fewer ignore the rest. The null pointer is 0 here:
# cuda-bindings refuse None.
_HIDDEN: Final = ((_POINTER, 0), (_POINTER, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """Device addresses of one call's tensors, aligned to 16 bytes; see `kernels` for their shapes.

    Attributes:
        scratch: At least as large as the launch says; not read where that is 0.
    """

    query: int
    key_cache: int
    value_cache: int
    input_pos: int
    output: int
    scratch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalars:
    """The op's attributes; see `StaticCacheAttentionAttributes`."""

    scale: float
    softcap: float
    sliding_window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKernels:
    """Kernels loaded into a CUDA context, ready to launch.

    Attributes:
        archive: Where they come from.
        kernels: Those for this device.
        functions: The driver's handles (CUfunction).
        num_multiprocessors: Of the device.
    """

    archive: KernelArchive
    kernels: dict[KernelName, CompiledKernel]
    functions: dict[KernelName, Any]
    num_multiprocessors: int

    def plan(self, call: CallShape, sliding_window: int = 0) -> Launch:
        """Return how a call is cut on this device, and how much scratch it takes."""
        return plan_launch(
            self.archive.shape,
            call,
            sliding_window=sliding_window,
            wide_block_m=self.kernels["wide"].block_m,
            num_multiprocessors=self.num_multiprocessors,
        )

    def run(self, call: CallShape, tensors: Tensors, scalars: Scalars, stream: int) -> None:
        """Queue one call of attention on a stream; returns at once.

        The tensors must stay until the stream has come to the end of it. May be captured into a
        CUDA graph, which then stays right for any values of `input_pos`.

        Args:
            call: The tensors' shapes.
            tensors: Their addresses.
            scalars: The op's attributes.
            stream: A CUstream; 0 for the default stream.

        Raises:
            SessionError: An address is not aligned, or the driver refuses the launch.
        """
        launch = self.plan(call, scalars.sliding_window)
        _check_alignment(tensors)
        partial_output = tensors.scratch if launch.scratch_bytes else 0
        partial_lse = partial_output + launch.lse_offset_bytes
        attend = (
            *((_POINTER, address) for address in (tensors.query, tensors.key_cache)),
            *((_POINTER, address) for address in (tensors.value_cache, tensors.input_pos)),
            *((_POINTER, address) for address in (tensors.output, partial_output, partial_lse)),
            (_FLOAT, scalars.scale),
            (_FLOAT, scalars.softcap),
            (_INT, scalars.sliding_window),
            (_INT, call.num_tokens),
            (_INT, call.capacity),
            (_INT, call.num_kv_heads),
        )
        self._launch(launch.tile_name, launch.grid, attend, stream)
        if launch.combine_grid is not None:
            combine = (
                *((_POINTER, address) for address in (partial_output, partial_lse, tensors.output)),
                (_INT, call.num_tokens),
                (_INT, call.num_kv_heads),
                (_INT, launch.num_parts),
            )
            self._launch("combine", launch.combine_grid, combine, stream)

    def _launch(
        self,
        name: KernelName,
        grid: tuple[int, int, int],
        arguments: tuple[tuple[Any, Any], ...],
        stream: int,
    ) -> None:
        kernel, driver = self.kernels[name], _driver()
        kinds, values = zip(*arguments, *_HIDDEN, strict=True)
        status = driver.cuLaunchKernel(
            self.functions[name],
            *grid,
            kernel.num_warps * _WARP_THREADS,
            1,
            1,
            kernel.shared_bytes,
            stream,
            (values, kinds),
            0,
        )
        _checked(status, f"launching the attention kernel {name} with grid {grid}")


def load_kernels(archive: KernelArchive) -> DeviceKernels:
    """Load an archive's kernels into the current CUDA context; once per context.

    Raises:
        BackendUnavailableError: cuda-bindings or the CUDA driver is missing.
        EngineError: The archive holds no kernels for this device.
        SessionError: No CUDA context is current, or the driver refuses the kernels.
    """
    driver = _driver()
    (context,) = _checked(driver.cuCtxGetCurrent(), "asking for the current CUDA context")
    if not int(context):
        raise SessionError("attention kernels are loaded into a CUDA context, and none is current")
    return _load_into(archive, int(context))


# The driver's modules live as long as their context: there is no order in which TensorRT destroys
# plugins that would say when they are no longer needed.
@functools.cache
def _load_into(archive: KernelArchive, _context: int) -> DeviceKernels:
    driver = _driver()
    attribute = driver.CUdevice_attribute
    (device,) = _checked(driver.cuCtxGetDevice(), "asking for the current GPU")
    major, minor, num_multiprocessors = (
        _checked(driver.cuDeviceGetAttribute(name, device), "asking what the GPU is")[0]
        for name in (
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
        )
    )
    kernels = archive.for_device(major * 10 + minor)
    return DeviceKernels(
        archive=archive,
        kernels=dict(kernels),
        functions={name: _load_function(kernel) for name, kernel in kernels.items()},
        num_multiprocessors=num_multiprocessors,
    )


def _load_function(kernel: CompiledKernel) -> Any:
    driver = _driver()
    loading = f"loading the attention kernel {kernel.name}"
    (module,) = _checked(driver.cuModuleLoadData(kernel.cubin), loading)
    symbol = kernel.symbol.encode()
    (function,) = _checked(driver.cuModuleGetFunction(module, symbol), loading)
    if kernel.shared_bytes > _STATIC_SHARED_BYTES:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        status = driver.cuFuncSetAttribute(function, attribute, kernel.shared_bytes)
        _checked(status, f"giving the attention kernel {kernel.name} {kernel.shared_bytes} bytes")
    return function


def _check_alignment(tensors: Tensors) -> None:
    for name in ("query", "key_cache", "value_cache", "input_pos", "output", "scratch"):
        address = getattr(tensors, name)
        if address % _ALIGNMENT_BYTES:
            raise SessionError(
                f"attention needs memory aligned to {_ALIGNMENT_BYTES} bytes; {name} is at "
                f"{address:#x}. Give each tensor an allocation of its own"
            )


@functools.cache
def _driver() -> Any:
    """Import the driver's bindings and initialize the driver."""
    try:
        from cuda.bindings import driver
    except ImportError as err:
        raise BackendUnavailableError(
            f"the attention plugin needs the Python package cuda-bindings: {err}. "
            "pip install cuda-bindings"
        ) from err
    try:
        status = driver.cuInit(0)
    except RuntimeError as err:  # how the bindings say that there is no libcuda
        raise BackendUnavailableError(
            f"the attention plugin needs NVIDIA's CUDA driver, which cannot be loaded: {err}"
        ) from err
    if int(status[0]):
        raise BackendUnavailableError(
            "the attention plugin needs a GPU, and the CUDA driver cannot be initialized: error "
            f"{int(status[0])}. See what nvidia-smi says"
        )
    return driver


def _checked(status: tuple[Any, ...], action: str) -> tuple[Any, ...]:
    """Return what a call of the driver gave, its error code left out.

    Raises:
        SessionError: The call failed; with CUDA's name of the error and its text.
    """
    error, *values = status
    if int(error):
        driver = _driver()
        name, text = (
            value[1].decode() if value[1] else "unknown"
            for value in (driver.cuGetErrorName(error), driver.cuGetErrorString(error))
        )
        raise SessionError(f"{action} failed: {name} ({text})")
    return tuple(values)

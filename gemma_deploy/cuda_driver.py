"""NVIDIA's CUDA driver, asked without torch or a CUDA toolkit, and without a word printed.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html
"""

import ctypes
import sys
from dataclasses import dataclass
from typing import Final

_COMPUTE_CAPABILITY_ATTRIBUTES: Final = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One CUDA device.

    Attributes:
        name: As the driver calls it.
        compute_capability: (major, minor).
        memory_bytes: Its whole memory.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int


def cuda_device_count() -> int:
    """Return how many CUDA devices this process sees; 0 without a driver."""
    cuda = _open_driver()
    return 0 if cuda is None else _device_count(cuda)


def read_driver() -> tuple[str | None, tuple[Gpu, ...]]:
    """Return the newest CUDA version the driver supports (None without a driver), and its devices."""
    cuda, version = _open_driver(), ctypes.c_int()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None, ()
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return driver, tuple(_read_gpu(cuda, ordinal) for ordinal in range(_device_count(cuda)))


def pci_bus_id(ordinal: int) -> str | None:
    """Return what nvidia-smi knows a device by, e.g. `00000000:65:00.0`; None if there is no such device.

    nvidia-smi counts devices in another order, and counts those that are hidden from this process.
    """
    cuda = _open_driver()
    if cuda is None or ordinal >= _device_count(cuda):
        return None
    device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    if cuda.cuDeviceGetPCIBusId(text, len(text), device) != 0:
        return None
    return text.value.decode()


def _open_driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def _device_count(cuda: ctypes.CDLL) -> int:
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _read_gpu(cuda: ctypes.CDLL, ordinal: int) -> Gpu:
    device, memory_bytes = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory_bytes), device)
    capability = [ctypes.c_int(), ctypes.c_int()]
    for value, attribute in zip(capability, _COMPUTE_CAPABILITY_ATTRIBUTES, strict=True):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=(capability[0].value, capability[1].value),
        memory_bytes=memory_bytes.value,
    )

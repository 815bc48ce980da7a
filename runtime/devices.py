"""Which device to run on: `Device`, parsed from `auto`, `cpu`, `cuda` or `cuda:N`."""

import ctypes
import re
import sys
from dataclasses import dataclass
from typing import Literal

from gemma_deploy.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device as asked for.

    Attributes:
        kind: `auto` is CUDA where it works, the CPU otherwise.
        index: Number of the CUDA device.
    """

    kind: Literal["auto", "cpu", "cuda"]
    index: int = 0

    @classmethod
    def parse(cls, text: str) -> "Device":
        """Read `auto`, `cpu`, `cuda` or `cuda:N`.

        Raises:
            RequestError: Anything else.
        """
        match = re.fullmatch(r"(auto|cpu|cuda)(?::(\d+))?", text)
        if match is None or (match[2] is not None and match[1] != "cuda"):
            raise RequestError(f"device is {text!r}; expected auto, cpu, cuda or cuda:N (N from 0)")
        kind: Literal["auto", "cpu", "cuda"] = match[1]  # type: ignore[assignment]  # as the pattern says
        return cls(kind=kind, index=int(match[2] or 0))


def cuda_device_count() -> int:
    """Return how many CUDA devices NVIDIA's driver offers; 0 without a driver.

    The driver itself is asked, so neither torch nor a CUDA toolkit is needed, and asking prints
    nothing (https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html).
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value

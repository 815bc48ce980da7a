"""Memory on NVIDIA GPUs as the driver's own program tells it.

https://docs.nvidia.com/deploy/nvidia-smi/. Nothing here has run on hardware yet.
"""

import shutil
import subprocess
from collections.abc import Iterable
from typing import Final

from gemma_deploy.cuda_driver import pci_bus_id

_MIB: Final = 1 << 20
_TIMEOUT_S: Final = 20


def process_gpu_bytes(pid: int) -> int | None:
    """Return what a process holds on all GPUs; None where nobody tells, as in most containers."""
    lines = _nvidia_smi("--query-compute-apps=pid,used_gpu_memory")
    return None if lines is None else sum_of_process(lines, pid)


def sum_of_process(lines: Iterable[str], pid: int) -> int | None:
    """Return the bytes of a process in lines such as `4242, 1130`, in MiB; None if it has none."""
    pairs = [[part.strip() for part in line.split(",")] for line in lines]
    held = [int(x[1]) for x in pairs if len(x) == 2 and x[0] == str(pid) and x[1].isdigit()]
    return sum(held) * _MIB if held else None


def free_gpu_bytes(index: int) -> int | None:
    """Return the free memory of a GPU, as CUDA counts them here; None where nobody tells."""
    bus_id = pci_bus_id(index)
    lines = None if bus_id is None else _nvidia_smi("--query-gpu=memory.free", f"--id={bus_id}")
    return int(lines[0]) * _MIB if lines and lines[0].strip().isdigit() else None


def _nvidia_smi(*arguments: str) -> list[str] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - a program of the driver, with arguments of our own
            [program, *arguments, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()

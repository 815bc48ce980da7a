"""Memory on NVIDIA GPUs as the driver's own program tells it. Nothing here has run on hardware yet."""

from collections.abc import Iterable
from typing import Final

from gemma_deploy.cuda_driver import pci_bus_id
from gemma_deploy.runtime.benchmark.nvidia_smi import ask_nvidia_smi

_MIB: Final = 1 << 20
_FORMAT: Final = "--format=csv,noheader,nounits"


def process_gpu_bytes(pid: int) -> int | None:
    """Return what a process holds on all GPUs; None where nobody tells, as in most containers."""
    lines = ask_nvidia_smi("--query-compute-apps=pid,used_gpu_memory", _FORMAT)
    return None if lines is None else sum_of_process(lines, pid)


def sum_of_process(lines: Iterable[str], pid: int) -> int | None:
    """Return the bytes of a process in lines such as `4242, 1130`, in MiB; None if it has none."""
    pairs = [[part.strip() for part in line.split(",")] for line in lines]
    held = [int(x[1]) for x in pairs if len(x) == 2 and x[0] == str(pid) and x[1].isdigit()]
    return sum(held) * _MIB if held else None


def free_gpu_bytes(index: int) -> int | None:
    """Return the free memory of a GPU, as CUDA counts them here; None where nobody tells."""
    bus_id = pci_bus_id(index)
    if bus_id is None:
        return None
    lines = ask_nvidia_smi("--query-gpu=memory.free", f"--id={bus_id}", _FORMAT)
    return int(lines[0]) * _MIB if lines and lines[0].strip().isdigit() else None

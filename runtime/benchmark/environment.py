"""What a benchmark ran on, as text by name: `read_environment`."""

import datetime as dt
import os
import platform
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from gemma_deploy.cuda_driver import pci_bus_id, read_driver
from gemma_deploy.machine import (
    PACKAGES,
    package_versions,
    read_cpu,
    read_memory_bytes,
    usable_cores,
)
from gemma_deploy.runtime.benchmark.nvidia_smi import ask_nvidia_smi
from gemma_deploy.runtime.benchmark.results import LOAD
from gemma_deploy.runtime.devices import Device

# What nvidia-smi calls it, and what we do. https://docs.nvidia.com/deploy/nvidia-smi/
_GPU_QUERIES: Final = {
    "driver_version": "driver",
    "clocks.sm": "GPU clock",
    "clocks.max.sm": "GPU clock, highest",
    "clocks.mem": "GPU memory clock",
    "clocks.max.mem": "GPU memory clock, highest",
    "power.limit": "GPU power limit",
}


def read_environment(
    *, threads: int | None, device: str, packages: Collection[str] = PACKAGES
) -> dict[str, str]:
    """Look at what will be measured on; imports no backend and changes nothing.

    What cannot be read on this machine is left out. Clocks are those of the moment, in MHz, and the
    highest where the system says it.

    Args:
        threads: Of the CPU kernels; None for one per core.
        device: Where models run: `auto`, `cpu`, `cuda` or `cuda:N`.
        packages: Whose versions matter to what is measured.

    Raises:
        RequestError: The device is none of these.
    """
    parsed = Device.parse(device)
    cpu, features = read_cpu()
    cores, memory_bytes = usable_cores(), read_memory_bytes()
    found = {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": cpu,
        "CPU features": ", ".join(features),
        "CPU clock": _cpu_clock(),
        "cores": str(cores),
        LOAD: _load_average(),
        "threads": f"{cores} (one per core)" if threads is None else str(threads),
        "memory": "" if memory_bytes is None else f"{memory_bytes / 2**30:.1f} GiB",
        "device": device,
    }
    if parsed.kind != "cpu":
        found |= _gpu_facts(parsed.index)
    found |= {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }
    versions = {name: value for name, value in package_versions().items() if name in packages}
    return {name: value for name, value in found.items() if value} | versions


def _load_average() -> str:
    """Return how many threads wanted to run over the last minute; empty where nothing says it."""
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except (AttributeError, OSError):  # Windows has none, and a container may hide it
        return ""


def _cpu_clock() -> str:
    """Return the cores' clocks now and the highest they can have; empty where nothing says it."""
    folders = list(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    now = [x / 1000 for folder in folders for x in _read_khz(folder / "scaling_cur_freq")]
    highest = [x / 1000 for folder in folders for x in _read_khz(folder / "cpuinfo_max_freq")]
    info = Path("/proc/cpuinfo")
    if not now and info.is_file():
        text = info.read_text(encoding="utf-8")
        now = [float(x) for x in re.findall(r"^cpu MHz\s*: ([\d.]+)$", text, re.MULTILINE)]
    return clock_text(now, highest)


def clock_text(now_mhz: Sequence[float], highest_mhz: Sequence[float]) -> str:
    """Return the range of the cores' clocks, and the highest possible, as far as they are known."""
    parts = []
    if now_mhz:
        low, high = round(min(now_mhz)), round(max(now_mhz))
        parts.append(f"{low} MHz" if low == high else f"{low} to {high} MHz")
    if highest_mhz:
        parts.append(f"at most {round(max(highest_mhz))} MHz")
    return ", ".join(parts)


def _read_khz(file: Path) -> Iterator[int]:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:  # some drivers list the file and refuse to read it
        return
    if text.isdigit():
        yield int(text)


def _gpu_facts(index: int) -> dict[str, str]:
    cuda_version, gpus = read_driver()
    if cuda_version is None or index >= len(gpus):
        return {}
    gpu = gpus[index]
    major, minor = gpu.compute_capability
    facts = {
        "GPU": f"{gpu.name}, compute capability {major}.{minor}",
        "GPU memory": f"{gpu.memory_bytes / 2**30:.1f} GiB",
        "CUDA of the driver": cuda_version,
    }
    bus_id = pci_bus_id(index)
    return facts if bus_id is None else facts | _driver_facts(bus_id)


def _driver_facts(bus_id: str) -> dict[str, str]:
    """Return the driver's version, clocks and power limit; nothing where the tool is not there."""
    query = f"--query-gpu={','.join(_GPU_QUERIES)}"
    lines = ask_nvidia_smi(f"--id={bus_id}", query, "--format=csv,noheader")
    return parse_nvidia_smi(lines[0]) if lines else {}


def parse_nvidia_smi(line: str) -> dict[str, str]:
    """Return the facts in an answer of nvidia-smi; those it does not know (`[N/A]`) are left out."""
    values = [value.strip() for value in line.strip().split(",")]
    if len(values) != len(_GPU_QUERIES):
        return {}
    pairs = zip(_GPU_QUERIES.values(), values, strict=True)
    return {name: value for name, value in pairs if value and not value.startswith("[")}

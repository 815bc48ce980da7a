"""The memory that programs can still get on this machine."""

import re
from pathlib import Path


def available_memory_bytes() -> int | None:
    """Return the memory, swap included, that programs can still get; None where nobody tells."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    sizes = dict(re.findall(r"^(\w+): +(\d+) kB$", info.read_text(encoding="ascii"), re.MULTILINE))
    available = 1024 * (int(sizes.get("MemAvailable", 0)) + int(sizes.get("SwapFree", 0)))
    in_container = _available_in_container()
    return available if in_container is None else min(available, in_container)


def _available_in_container() -> int | None:
    """Return what a limit on this process's control group leaves, or None."""
    folder = Path("/sys/fs/cgroup")
    limit, used = folder / "memory.max", folder / "memory.stat"
    if not (limit.is_file() and used.is_file()):
        return None
    most = limit.read_text(encoding="ascii").strip()
    if not most.isdigit():
        return None
    # The rest of what is used are copies of files, given up when memory is short.
    match = re.search(r"^anon (\d+)$", used.read_text(encoding="ascii"), re.MULTILINE)
    return max(0, int(most) - (int(match[1]) if match else 0))

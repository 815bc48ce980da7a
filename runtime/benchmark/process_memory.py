"""Memory of the running process, as the system counts it: `read_memory`."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

_KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """What this process has taken so far.

    Attributes:
        peak_bytes: Largest resident memory so far; None where the system does not tell.
        anonymous_bytes: Resident memory at this moment that no file backs; None likewise.
    """

    peak_bytes: int | None
    anonymous_bytes: int | None


def read_memory() -> ProcessMemory:
    """Ask the system: /proc on Linux, getrusage elsewhere."""
    status = Path("/proc/self/status")
    if status.is_file():
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", status.read_text("ascii"), re.MULTILINE))
        peak, anonymous = (
            int(sizes[name]) * _KIB if name in sizes else None for name in ("VmHWM", "RssAnon")
        )
        return ProcessMemory(peak_bytes=peak, anonymous_bytes=anonymous)
    try:
        import resource
    except ImportError:  # Windows
        return ProcessMemory(peak_bytes=None, anonymous_bytes=None)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return ProcessMemory(
        peak_bytes=largest * (1 if sys.platform == "darwin" else _KIB), anonymous_bytes=None
    )

"""The rate at which all threads together read main memory: `read_bandwidth`."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np

# Far beyond the caches, and small beside a model.
_LEAST_BYTES: Final = 256 << 20
_CACHES: Final = 8
_REPEATS: Final = 8


def read_bandwidth(threads: int) -> float:
    """Return bytes per second, of the fastest of several passes over a buffer.

    Each thread looks for the largest number in a part of its own, which numpy does with vector
    instructions and without holding the interpreter's lock; at that it is as fast as a loop in C.

    Args:
        threads: Threads that read, at least 1.
    """
    size_bytes = max(_LEAST_BYTES, _CACHES * last_level_cache_bytes())
    # Every page is written: untouched ones would all be the same page of zeros.
    parts = [np.ones(size_bytes // threads // 4, np.int32) for _ in range(threads)]
    fastest_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            started_s = time.perf_counter()
            for _ in pool.map(np.max, parts):
                pass
            fastest_s = min(fastest_s, time.perf_counter() - started_s)
    return sum(part.nbytes for part in parts) / fastest_s


def last_level_cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return the size of the caches of the third level, all together; 0 where nobody tells."""
    found = {}
    for folder in cpus.glob("cpu[0-9]*/cache/index3"):
        size = re.fullmatch(r"(\d+)K", _text(folder / "size"))
        if size is not None:
            found[_text(folder / "shared_cpu_list")] = int(size[1]) << 10
    return sum(found.values())


def _text(file: Path) -> str:
    return file.read_text(encoding="ascii").strip() if file.is_file() else ""

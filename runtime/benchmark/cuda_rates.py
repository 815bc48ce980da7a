"""What a GPU can do at most, measured with torch: `copy_bandwidth`, `half_matrix_rate`.

Nothing here has run on hardware yet.
"""

from collections.abc import Callable
from typing import Final

import torch

# Beyond the caches of any GPU, and as large as products need to be to reach their rate.
_COPY_BYTES: Final = 1 << 30
_SIZE: Final = 8192
_REPEATS: Final = 10


def copy_bandwidth(index: int) -> float:
    """Return bytes read and written per second, of the fastest of several copies on the device."""
    with torch.cuda.device(index):
        source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * _COPY_BYTES / _fastest_s(lambda: target.copy_(source))


def half_matrix_rate(index: int) -> float:
    """Return operations per second of a large float16 product, the fastest of several."""
    with torch.cuda.device(index):
        x = torch.randn(_SIZE, _SIZE, dtype=torch.float16, device="cuda")
        y = torch.empty_like(x)
        return 2 * _SIZE**3 / _fastest_s(lambda: torch.mm(x, x, out=y))


def _fastest_s(work: Callable[[], object]) -> float:
    work()
    fastest_ms = float("inf")
    for _ in range(_REPEATS):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # the same
        begin.record()
        work()
        end.record()
        end.synchronize()
        fastest_ms = min(fastest_ms, begin.elapsed_time(end))
    return fastest_ms / 1e3

import ctypes
import platform
import subprocess
import sys

import pytest

# Blocks too small to be mapped one by one; the last keeps the others from the heap's end.
_FREE_100_MB = """
import ctypes
from gemma_deploy.freed_memory import return_freed_memory

def anonymous_mb():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon"))

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
before = anonymous_mb()
blocks = [libc.malloc(50_000) for _ in range(2000)]
for block in blocks:
    ctypes.memset(ctypes.c_void_p(block), 1, 50_000)
for block in blocks[:-1]:
    libc.free(block)
freed = anonymous_mb()
return_freed_memory()
print(freed - before, anonymous_mb() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_freed_memory_is_given_back() -> None:
    shown = subprocess.check_output([sys.executable, "-c", _FREE_100_MB], text=True)
    freed_mb, left_mb = map(float, shown.split())
    assert freed_mb > 90  # the premise
    assert left_mb < 10


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_deploy.freed_memory import return_freed_memory

    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    return_freed_memory()

"""Another name for a loaded shared library: `give_unversioned_name`.

TensorRT for RTX opens itself as `libtensorrt_rtx.so` when its ONNX parser meets a plugin, and the
process aborts where there is only `libtensorrt_rtx.so.1`, as in the wheels on PyPI. The dynamic linker
takes a library that is loaded already if its SONAME is the one asked for, so an empty library of that
name which depends on the real one is enough. It is written here, since a device has no compiler and
the folder of installed packages may be read-only.

ELF: https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html
"""

import ctypes
import platform
import struct
import sys
import tempfile
from pathlib import Path
from typing import Final

_MACHINES: Final = {"x86_64": 62, "aarch64": 183}
_HEADER_BYTES: Final = 64
_PROGRAM_HEADER_BYTES: Final = 56
_SYMBOL_BYTES: Final = 24
_PAGE_BYTES: Final = 65536  # the largest page of any kernel on these machines
_LOAD, _DYNAMIC, _STACK = 1, 2, 0x6474E551
_READ, _WRITE = 4, 2
# Tags of the dynamic section.
_END, _NEEDED, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME = 0, 1, 5, 6, 10, 11, 14


def give_unversioned_name(alias: str, name: str) -> None:
    """Make `dlopen(alias)` in this process give the library `name` from now on.

    Does nothing where `alias` can be opened already, and outside Linux.

    Args:
        alias: File name without a path, e.g. `libtensorrt_rtx.so`.
        name: SONAME of a library that is loaded.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in _MACHINES:
        return
    try:
        ctypes.CDLL(alias)
    except OSError:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / alias
            path.write_bytes(_empty_library(soname=alias, needed=name))
            ctypes.CDLL(str(path))  # stays loaded when the file is gone


def _empty_library(*, soname: str, needed: str) -> bytes:
    """Return a 64-bit ELF library without code: a name, and a dependency."""
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    strings += b"\0" * (-len(strings) % 8)
    string_offset = _HEADER_BYTES + 3 * _PROGRAM_HEADER_BYTES
    symbol_offset = string_offset + len(strings)
    dynamic_offset = symbol_offset + _SYMBOL_BYTES
    entries = [
        (_SONAME, 1),
        (_NEEDED, 1 + len(soname) + 1),
        (_STRTAB, string_offset),
        (_STRSZ, len(strings)),
        (_SYMTAB, symbol_offset),
        (_SYMENT, _SYMBOL_BYTES),
        (_END, 0),
    ]
    dynamic = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    size = dynamic_offset + len(dynamic)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",  # 64 bits, little-endian, version 1
        3,  # a shared object
        _MACHINES[platform.machine()],
        1,
        0,
        _HEADER_BYTES,
        0,
        0,
        _HEADER_BYTES,
        _PROGRAM_HEADER_BYTES,
        3,
        0,
        0,
        0,
    )
    segments = [
        _segment(_LOAD, 0, size, _PAGE_BYTES),
        _segment(_DYNAMIC, dynamic_offset, len(dynamic), 8),
        # Without it the linker would want an executable stack, which hardened systems refuse.
        _segment(_STACK, 0, 0, 16),
    ]
    return header + b"".join(segments) + strings + bytes(_SYMBOL_BYTES) + dynamic


def _segment(kind: int, offset: int, size: int, alignment: int) -> bytes:
    # The linker relocates the dynamic section's addresses in place: the segment is writable.
    flags = _READ | _WRITE
    return struct.pack("<IIQQQQQQ", kind, flags, offset, offset, offset, size, size, alignment)

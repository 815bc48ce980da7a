"""Two folders that change places in one step: `exchange_folders`."""

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Final

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2  # Linux: renameat2(2)
_RENAME_SWAP: Final = 2  # macOS: renamex_np(2)
# What a kernel or a file system (NFS, many of FUSE) says that cannot do it.
_UNABLE: Final = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM}
)


def exchange_folders(one: Path, other: Path) -> bool:
    """Let two existing folders change places: at every moment there is one at either path.

    Returns:
        False if nothing was done: this system or this file system cannot do it.

    Raises:
        OSError: It can, and failed.
    """
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(*paths, ctypes.c_uint(_RENAME_SWAP))
        else:
            at = _AT_FDCWD
            failed = libc.renameat2(at, paths[0], at, paths[1], ctypes.c_uint(_RENAME_EXCHANGE))
    except AttributeError:  # a C library without the function
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))

"""Memory that was freed and is still the process's: `return_freed_memory`."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Give memory that libraries have freed back to the system; glibc alone keeps it unasked.

    Parsing a tokenizer or a graph takes several times what is left of it. Does nothing on other systems
    and with other C libraries.
    """
    if sys.platform != "linux":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl has none
        return
    trim(ctypes.c_size_t(0))

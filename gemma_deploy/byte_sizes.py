"""Sizes in bytes as people read them: `format_bytes`."""

from typing import Final

_BINARY_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(size_bytes: int) -> str:
    """Return a size for people, in the binary unit that fits it: `1.50 GiB`."""
    size = float(size_bytes)
    unit = 0
    while size >= 1024 and unit < len(_BINARY_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size_bytes} B" if unit == 0 else f"{size:.2f} {_BINARY_UNITS[unit]}"

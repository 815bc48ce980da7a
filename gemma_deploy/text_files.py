"""Text that people give in files and on stdin, whatever system wrote it."""

from pathlib import Path
from typing import Final

from gemma_deploy.errors import RequestError

BYTE_ORDER_MARK: Final = "\ufeff"
_UTF_16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file as `decode_text` does.

    Raises:
        RequestError: It cannot be read, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise RequestError(
            f"{path} cannot be read: {err.strerror or err}; give a text file in UTF-8"
        ) from err
    return decode_text(raw, str(path))


def decode_text(raw: bytes, place: str) -> str:
    """Return UTF-8 bytes as text: without a byte order mark, lines ended by LF.

    Args:
        raw: The bytes.
        place: What an error calls them.

    Raises:
        RequestError: They are not UTF-8, with the place of the first byte that is not.
    """
    try:
        return plain_text(raw.decode("utf-8"))
    except UnicodeDecodeError as err:
        is_utf_16 = raw.startswith(_UTF_16_MARKS)
        raise RequestError(
            f"{place} is not UTF-8 text: byte {err.start:,} is 0x{raw[err.start]:02x}"
            f"{', and it begins as UTF-16 does' if is_utf_16 else ''}. Save it as UTF-8"
        ) from err


def plain_text(text: str) -> str:
    """Return a text without a byte order mark at its start; CR LF and a lone CR become LF."""
    text = text.removeprefix(BYTE_ORDER_MARK)
    return text.replace("\r\n", "\n").replace("\r", "\n")

"""Text that people give in files and on stdin, whatever system wrote it."""

from pathlib import Path
from typing import BinaryIO, Final

from gemma_deploy.errors import RequestError
from gemma_deploy.limits import MAX_TEXT_BYTES

BYTE_ORDER_MARK: Final = "\ufeff"
_UTF_16_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file as `decode_text` does.

    Raises:
        RequestError: It cannot be read, is too large, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:  # a pipe, too
            raw = read_bounded(file, str(path))
    except OSError as err:
        raise RequestError(
            f"{path} cannot be read: {err.strerror or err}; give a text file in UTF-8"
        ) from err
    return decode_text(raw, str(path))


def read_bounded(file: BinaryIO, place: str) -> bytes:
    """Return all that a file still holds.

    Raises:
        RequestError: That is more than any text, or has no end.
    """
    raw = file.read(MAX_TEXT_BYTES + 1)
    if len(raw) > MAX_TEXT_BYTES:
        raise RequestError(
            f"{place} holds more than {MAX_TEXT_BYTES:,} bytes, the most that is read as a text: give "
            "a part of it"
        )
    return raw


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

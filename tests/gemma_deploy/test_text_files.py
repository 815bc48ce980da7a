from pathlib import Path

import pytest

from gemma_deploy.errors import RequestError
from gemma_deploy.text_files import decode_text, plain_text, read_text


@pytest.mark.parametrize(
    "raw",
    [
        b"one\ntwo\n",
        b"one\r\ntwo\r\n",
        b"one\rtwo\r",
        b"\xef\xbb\xbfone\r\ntwo\n",
    ],
)
def test_a_text_is_the_same_from_any_system(raw: bytes, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(raw)
    assert decode_text(raw, "stdin") == read_text(file) == "one\ntwo\n"


def test_nothing_else_is_changed() -> None:
    text = " \tπ\u2028\x0b\x0cend \ufeff"
    assert plain_text(text) == text
    assert decode_text(text.encode(), "stdin") == text


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("café".encode("latin-1"), "place is not UTF-8 text: byte 3 is 0xe9. Save it as UTF-8"),
        ("hi".encode("utf-16"), "byte 0 is 0xff, and it begins as UTF-16 does. Save it as UTF-8"),
        (b"ok\xed\xa0\x80", "byte 2 is 0xed. Save"),
    ],
)
def test_another_encoding_is_named(raw: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        decode_text(raw, "place")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nowhere cannot be read: No such file"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(RequestError, match="latin is not UTF-8 text: byte 3"):
        read_text(tmp_path / "latin")

"""Files of others: bounded, regular, and JSON that all programs read alike."""

import os
import threading
from pathlib import Path
from unittest.mock import ANY

import pytest

from gemma_deploy.errors import ConfigError
from gemma_deploy.json_files import parse_json, read_bytes, read_json
from gemma_deploy.limits import MAX_JSON_DEPTH


def parse(raw: bytes | str) -> dict[str, object]:
    return parse_json(raw, "the file", error=ConfigError, remedy="get it again")


def nested(depth: int) -> str:
    return '{"x": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[1]", "holds a list, expected a JSON object"),
        ("7", "holds a int, expected a JSON object"),
        (b'{"a": "\xff"}', "invalid start byte"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ('{"a": "\\ud83d \\ude00"}', "half a character"),
        (nested(MAX_JSON_DEPTH + 1), "nested deeper than 64"),
        (nested(100_000), "nested deeper than 64"),
        ('{"x": ' * 100_000, "nested deeper than 64"),
        ('{"a": ' + "1" * 1001 + "}", "a number has 1,001 digits"),
        ('{"a": ' + "1" * 100_000 + "}", "a number has 100,000 digits"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice, with different values"),
        ('{"a": 1, "a": true}', "'a' is there twice"),
        ('{"a": 0, "a": false}', "'a' is there twice"),
        ('{"a": 1, "a": 1.0}', "'a' is there twice"),
        ('{"a": 0.0, "a": -0.0}', "'a' is there twice"),
        ('{"a": [{"b": 1}], "a": [{"b": true}]}', "'a' is there twice"),
        ("\ufeff\ufeff{}", "Expecting value|BOM"),
        (b"\xef\xbb\xbf" * 2 + b"{}", "Expecting value|BOM"),
    ],
)
def test_what_is_no_json_object(raw: bytes | str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"the file .*{message}.*; get it again"):
        parse(raw)


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('\ufeff{"a": 1}', {"a": 1}),
        ('{"a": NaN, "a": NaN, "b": 1}', {"a": ANY, "b": 1}),
        ('{"a": "\\ud83d\\ude00 \\\\ud800"}', {"a": "😀 \\ud800"}),
        ('{"a": [1, 2], "a": [1, 2]}', {"a": [1, 2]}),
        ('{"a": ' + "1" * 400 + "}", {"a": int("1" * 400)}),
    ],
)
def test_what_is(raw: bytes | str, value: object) -> None:
    assert parse(raw) == value


def test_as_deep_as_can_be() -> None:
    assert parse(nested(MAX_JSON_DEPTH))


def read(path: Path, max_bytes: int = 10) -> bytes:
    return read_bytes(path, max_bytes=max_bytes, error=ConfigError, remedy="get it again")


def test_sizes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read(tmp_path / "file") == b"0123456789"
    with pytest.raises(ConfigError, match="file is larger than 9 bytes"):
        read(tmp_path / "file", 9)


def test_missing_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot be read: "):
        read(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: "):
        read_json(tmp_path / ("a" * 300), max_bytes=9, error=ConfigError, remedy="get it again")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    failures: list[str] = []

    def attempt() -> None:
        try:
            read(tmp_path / "pipe")
        except ConfigError as err:
            failures.append(str(err))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(30)
    assert "it is no regular file" in failures[0]


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device without an end")
def test_a_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="it is no regular file"):
        read(Path("/dev/zero"))

import io
import sys
from pathlib import Path

import click
import pytest

from gemma_deploy.cli.prompts import read_prompts
from gemma_deploy.errors import RequestError


class TestArguments:
    def test_are_taken_as_they_are(self) -> None:
        assert read_prompts(("one", " two ", ""), None) == ["one", " two ", ""]

    def test_in_another_encoding(self) -> None:
        with pytest.raises(
            RequestError, match=r"prompt 2 is not valid .*LC_ALL=C.UTF-8 or PYTHONU"
        ):
            read_prompts(("fine", "caf\udce9"), None)

    def test_of_windows(self) -> None:
        assert read_prompts(("\ufeffone\r\ntwo\r",), None) == ["one\ntwo\n"]

    def test_a_file_that_is_one_prompt(self, tmp_path: Path) -> None:
        path = tmp_path / "prompt.txt"
        path.write_bytes(b"\xef\xbb\xbfTwo lines\r\nof one prompt\r\n")
        assert read_prompts((), None, path) == ["Two lines\nof one prompt"]
        for arguments, file in ((("a",), None), ((), "f")):
            with pytest.raises(click.UsageError, match="--prompt-file is one prompt"):
                read_prompts(arguments, file, path)
        path.write_text("\n")
        with pytest.raises(RequestError, match=r"prompt\.txt is empty"):
            read_prompts((), None, path)

    def test_beside_a_file(self) -> None:
        with pytest.raises(click.UsageError, match="arguments or from --file, not both"):
            read_prompts(("one",), "file.txt")


class TestFile:
    def test_one_prompt_per_line(self, tmp_path: Path) -> None:
        file = tmp_path / "prompts.txt"
        file.write_bytes("first\r\n\n  second: π\u2028go on\n".encode())

        assert read_prompts((), str(file)) == ["first", "  second: π\u2028go on"]

    def test_json_lines(self, tmp_path: Path) -> None:
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"prompt": "two\\nlines", "id": 7}\n\n{"prompt": ""}\n')

        assert read_prompts((), str(file)) == ["two\nlines", ""]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("just text", "line 2 cannot be read as JSON: Expecting value"),
            ("[1]", "line 2 holds a list, expected a JSON object; write lines such as"),
            ('{"text": "a"}', 'line 2 has no prompt; write lines such as {"prompt": "..."}'),
            ('{"prompt": 3}', "line 2: the prompt is 3, expected a string"),
            (
                '{"prompt": "\\ud800"}',
                "line 2 cannot be read as JSON: a string holds half a character",
            ),
            ("[" * 100_000, "line 2 cannot be read as JSON: objects and lists are nested deeper"),
        ],
    )
    def test_json_lines_that_are_not(self, tmp_path: Path, line: str, message: str) -> None:
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"prompt": "fine"}\n' + line)

        with pytest.raises(RequestError) as err:
            read_prompts((), str(file))

        assert message in str(err.value)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="cannot be read: No such file"):
            read_prompts((), str(tmp_path / "nowhere"))

    def test_binary(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"\xff\xfe")

        with pytest.raises(RequestError, match="is not UTF-8 text"):
            read_prompts((), str(tmp_path / "file"))

    def test_of_windows(self, tmp_path: Path) -> None:
        lines = tmp_path / "prompts.txt"
        lines.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\r\n")
        objects = tmp_path / "prompts.jsonl"
        objects.write_bytes(
            b'\xef\xbb\xbf{"prompt": "one\\r\\ntwo"}\r\n{"prompt": "\\ufeffthree"}\r\n'
        )

        assert read_prompts((), str(lines)) == ["one", "two", "three"]
        assert read_prompts((), str(objects)) == ["one\ntwo", "three"]

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("\n \n")

        with pytest.raises(RequestError, match="holds no prompt: expected one per line"):
            read_prompts((), str(tmp_path / "file"))


class TestStdin:
    def test_is_one_prompt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe(monkeypatch, "two\nlines\n")

        assert read_prompts((), None) == ["two\nlines"]

    def test_is_a_file_called_dash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe(monkeypatch, "two\nprompts\n")

        assert read_prompts((), "-") == ["two", "prompts"]

    def test_of_windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe(monkeypatch, "\ufefftwo\r\nlines\r\n")
        assert read_prompts((), None) == ["two\nlines"]

        pipe(monkeypatch, "\ufefftwo\r\nprompts\r\n")
        assert read_prompts((), "-") == ["two", "prompts"]

    def test_in_another_encoding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        latin = io.TextIOWrapper(io.BytesIO("café".encode("latin-1")))
        monkeypatch.setattr(sys, "stdin", latin)

        with pytest.raises(RequestError, match="stdin is not UTF-8 text: byte 3 is 0xe9"):
            read_prompts((), None)

    def test_empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe(monkeypatch, "")

        with pytest.raises(RequestError, match="stdin is empty"):
            read_prompts((), None)

    def test_a_terminal_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe(monkeypatch, "")
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)

        with pytest.raises(click.UsageError, match="no prompt: give one"):
            read_prompts((), None)


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

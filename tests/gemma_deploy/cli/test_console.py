import io
import json
import math
import sys

import pytest

from gemma_deploy.cli import console


class TestFormatBytes:
    @pytest.mark.parametrize(
        ("size_bytes", "text"),
        [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (5_012_344_832, "4.67 GiB"),
            (5 << 50, "5120.00 TiB"),
        ],
    )
    def test_in_binary_units(self, size_bytes: int, text: str) -> None:
        assert console.format_bytes(size_bytes) == text


class TestJson:
    def test_is_readable_where_the_stream_is_utf8(self, capsys: pytest.CaptureFixture[str]) -> None:
        console.emit_json({"text": "π"})

        assert capsys.readouterr() == ('{"text": "π"}\n', "")

    def test_is_escaped_where_it_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))

        console.emit_json({"text": "π🚢"})

        assert json.loads(raw.getvalue().decode("ascii")) == {"text": "π🚢"}

    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_never_holds_what_json_cannot(self, number: float) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            console.emit_json({"x": number})


class TestProgress:
    def test_is_a_line_per_stage_without_a_terminal(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with console.progress() as show, console.working("nothing"):
            for stage, done in (("one", 0), ("one", 5), ("two", 1)):
                show(stage, done, 10)

        assert capsys.readouterr() == ("", "one ...\ntwo ...\n")

    def test_is_a_bar_that_goes_away_on_a_terminal(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pretend_terminal(monkeypatch)

        with pytest.raises(KeyboardInterrupt):
            interrupted_task()

        out, err = capsys.readouterr()
        assert out == ""
        assert "writing weights" in err
        assert err.rfind("\x1b[?25h") > err.rfind("\x1b[?25l")  # the cursor is shown again

    def test_is_a_spinner_for_what_cannot_be_measured(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pretend_terminal(monkeypatch)

        with console.working("loading"):
            pass

        assert capsys.readouterr().out == ""


def interrupted_task() -> None:
    with console.progress() as show:
        show("writing weights", 5, 10)
        raise KeyboardInterrupt


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

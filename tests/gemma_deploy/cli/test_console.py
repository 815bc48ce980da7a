import io
import json
import logging
import math
import sys

import pytest

from gemma_deploy.cli import console


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


ESCAPE = "gptq\x1b]0;pwned\x07\x1b[31m\u202e"
SHOWN = "gptq\\u001b]0;pwned\\u0007\\u001b[31m\\u202e"


class TestControlCharacters:
    def test_of_names_and_texts_are_escaped(self, capsys: pytest.CaptureFixture[str]) -> None:
        console.say(ESCAPE)
        console.emit_json({"x": ESCAPE})
        console.emit_table([(ESCAPE, f"{ESCAPE}\n  forged  row")], title=ESCAPE)
        console.emit_columns([("a", "b"), (ESCAPE, ESCAPE)], title=ESCAPE)
        console.notice(ESCAPE)
        console.warn(ESCAPE)
        with console.progress() as show:
            show(ESCAPE, 0, 1)

        out, err = capsys.readouterr()
        assert out.splitlines() == [
            SHOWN,
            json.dumps({"x": SHOWN}).replace("\\\\", "\\"),
            SHOWN,
            f"  {SHOWN}  {SHOWN}\\u000a  forged  row",
            SHOWN,
            f"  a{' ' * len(SHOWN)}{' ' * len(SHOWN)}b",
            f"  {SHOWN}  {SHOWN}",
        ]
        assert err.splitlines() == [SHOWN, f"Warning: {SHOWN}", f"{SHOWN} ..."]

    def test_of_logs_are_escaped(self) -> None:
        record = logging.LogRecord("x", logging.WARNING, "", 1, "%s", (ESCAPE,), None)
        assert console.VisibleFormatter().format(record) == SHOWN

    @pytest.mark.parametrize("is_terminal", [True, False])
    def test_of_a_models_words_are_escaped_on_a_terminal(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
    ) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
        console.speak("a\x1b[2J")
        console.speak("\u202eb", ends_line=True)
        words = "a\\u001b[2J\u202eb\n" if is_terminal else "a\x1b[2J\u202eb\n"
        assert capsys.readouterr().out == words


class TestProgress:
    def test_is_a_line_per_stage_without_a_terminal(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with console.progress() as show, console.working("nothing"):
            for stage, done in (("one", 0), ("one", 5), ("two", 1)):
                show(stage, done, 10)

        assert capsys.readouterr() == ("", "one ...\ntwo ...\n")

    def test_long_stages_say_how_far_they_are(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 0.0
        monkeypatch.setattr("time.monotonic", lambda: now)
        with console.progress() as show:
            for layer in range(19):  # 18 layers of 50 s each
                show("quantizing layers", layer, 18)
                now += 50
            for block in range(0, 5_000, 50):  # 100 blocks of 1 s each
                show("writing weights", block, 5_000)
                now += 1

        lines = capsys.readouterr().err.splitlines()
        assert lines[:3] == [
            "quantizing layers ...",
            "quantizing layers: 1 of 18, 0:50 so far, about 14:10 left",
            "quantizing layers: 2 of 18, 1:40 so far, about 13:20 left",
        ]
        assert lines[18] == "quantizing layers: 18 of 18, 15:00 so far"
        assert lines[19:] == [
            "writing weights ...",
            "writing weights: 30%, 0:30 so far, about 1:10 left",
            "writing weights: 60%, 1:00 so far, about 0:40 left",
            "writing weights: 90%, 1:30 so far, about 0:10 left",
        ]

    def test_a_stage_that_comes_again_begins_anew(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        times = iter([0.0, 100.0, 200.0, 240.0])
        monkeypatch.setattr("time.monotonic", lambda: next(times))
        show = console.StageLines()
        for done in (0, 2, 0, 1):
            show("reading", done, 2)

        assert capsys.readouterr().err.splitlines() == [
            "reading ...",
            "reading: 2 of 2, 1:40 so far",
            "reading ...",
            "reading: 1 of 2, 0:40 so far, about 0:40 left",
        ]

    @pytest.mark.parametrize(
        ("seconds", "text"), [(59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (36_125, "10:02:05")]
    )
    def test_durations(
        self,
        seconds: float,
        text: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        times = iter([0.0, seconds])
        monkeypatch.setattr("time.monotonic", lambda: next(times))
        show = console.StageLines()
        show("reading", 0, 2)
        show("reading", 2, 2)

        assert capsys.readouterr().err.endswith(f"reading: 2 of 2, {text} so far\n")

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

    @pytest.mark.parametrize("name", ["m[/b]", "[red]m[/red]", "[link=file:///x]m", ":smile:"])
    def test_names_are_no_markup(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        pretend_terminal(monkeypatch)

        with console.working(f"loading {name}"):
            pass
        assert f"loading {name} ..." in capsys.readouterr().err
        with console.progress() as show:
            show(name, 1, 2)
        assert name in capsys.readouterr().err


def interrupted_task() -> None:
    with console.progress() as show:
        show("writing weights", 5, 10)
        raise KeyboardInterrupt


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

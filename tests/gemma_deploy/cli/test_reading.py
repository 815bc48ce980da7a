import io
import sys

import pytest

from gemma_deploy.cli.reading import reading_progress


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_at(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    """Put a terminal in place of stderr; pytest would take a fixture's away again."""
    terminal = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    return terminal


def test_a_long_prompt_has_a_bar_that_is_gone_before_the_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stderr = terminal_at(monkeypatch)
    with reading_progress() as show:
        show(0, 2000)
        show(512, 2000)
        show(2000, 2000)
        shown = stderr.getvalue()
        assert "reading the prompt" in shown
        assert "2000" in shown
        assert shown.endswith(("\x1b[2K", "\x1b[?25h", "\x1b[1A\x1b[2K"))
    assert stderr.getvalue() == shown


def test_each_batch_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal_at(monkeypatch)
    with reading_progress() as show:
        for total in (1500, 1700):
            show(0, total)
            show(total, total)
    assert "1500" in stderr.getvalue()
    assert "1700" in stderr.getvalue()


def test_a_short_prompt_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal_at(monkeypatch)
    with reading_progress() as show:
        show(0, 512)
        show(512, 512)
    assert stderr.getvalue() == ""


def test_a_log_has_a_line_and_another_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with reading_progress() as show:
        for done in range(0, 2001, 500):
            show(done, 2000)
            now += 20
    assert capsys.readouterr() == (
        "",
        "reading the prompt ...\nreading the prompt: 50%, 0:40 so far, about 0:40 left\n",
    )


def test_a_log_has_nothing_of_a_short_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    with reading_progress() as show:
        show(0, 512)
        show(256, 512)
    assert capsys.readouterr() == ("", "")

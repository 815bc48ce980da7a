import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.errors import EngineBuildError
from gemma_deploy.exporters.engine import process
from gemma_deploy.exporters.engine.process import build_in_child

REQUEST: Any = {"bundle": "b", "build": {}, "phase": "prefill", "plan": "p"}
PRELUDE = """
import json, os, signal, sys, time
request = json.loads(sys.stdin.readline())
def send(kind, **body):
    print(json.dumps({"kind": kind, **body}), flush=True)
"""

Play = Callable[[str], Any]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Return `play(script)`: what comes of a child that does as the script says."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(process, "_MODULE", "actor")

    def run(script: str, on_progress: Any = lambda *_: None) -> Any:
        (tmp_path / "actor.py").write_text(PRELUDE + textwrap.dedent(script))
        return build_in_child(REQUEST, on_progress)

    return run


def test_progress_and_result_come_back(play: Any) -> None:
    seen: list[Any] = []
    record = play(
        """
        send("progress", stage=request["phase"], done=1, total=2)
        send("library_error", text="harmless in the end")
        send("done", size_bytes=5, sha256="ab")
        """,
        lambda *x: seen.append(x),
    )
    assert seen == [("prefill", 1, 2)]
    assert (record.size_bytes, record.sha256) == (5, "ab")


def test_errors_are_passed_on(play: Play) -> None:
    with pytest.raises(EngineBuildError, match=r"^no kernel$"):
        play('send("error", text="no kernel")')


def test_failed_writing_stays_an_os_error(play: Play) -> None:
    with pytest.raises(OSError, match=r"No space left") as caught:
        play('send("os_error", errno=28, reason="No space left", filename="/x/engine.plan")')
    assert (caught.value.errno, caught.value.filename) == (28, "/x/engine.plan")


@pytest.mark.parametrize(
    ("number", "explanation"),
    [
        ("SIGSEGV", r"crashed \(SIGSEGV\)"),
        ("SIGABRT", r"crashed \(SIGABRT\)"),
        ("SIGKILL", r"was killed \(SIGKILL\), most often by the system when memory runs out"),
    ],
)
def test_a_crash_is_explained(number: str, explanation: str, play: Play) -> None:
    with pytest.raises(EngineBuildError, match=explanation) as caught:
        play(
            f"""
            send("library_error", text="CHECK(a == b) failed")
            print("terminate called", file=sys.stderr, flush=True)
            sys.stdout.write('{{"kind": "do'); sys.stdout.flush()
            os.kill(os.getpid(), signal.{number})
            """
        )
    assert str(caught.value).endswith("CHECK(a == b) failed\nterminate called")


def test_a_python_error_of_ours_shows(play: Play) -> None:
    with pytest.raises(EngineBuildError, match=r"ended with exit code 1(.|\n)*ZeroDivisionError"):
        play("1 / 0")


def test_a_child_that_dies_before_it_reads(
    tmp_path: Path, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mute.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(process, "_MODULE", "mute")
    with pytest.raises(EngineBuildError, match=r"exit code 3(.|\n)*it said nothing"):
        play("")


def test_whatever_ends_the_call_ends_the_child(tmp_path: Path, play: Any) -> None:
    pid_file = tmp_path / "pid"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(
            f"""
            open({str(pid_file)!r}, "w").write(str(os.getpid()))
            send("progress", stage="build", done=0, total=1)
            time.sleep(60)
            """,
            interrupt,
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)

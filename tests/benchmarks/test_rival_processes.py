"""A turn is a process whose memory is read from outside."""

import dataclasses
import sys
from pathlib import Path

import pytest

from benchmarks.rival_contenders import RIVALS, check_installed
from benchmarks.rival_processes import run_turn
from gemma_deploy.errors import BackendUnavailableError, SessionError

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
MODEL = "import time; block = bytearray(b'x') * (64 << 20); time.sleep(0.4)"
PARENT = """
import subprocess, sys
block = bytearray(b"x") * (256 << 20)
subprocess.run([sys.executable, sys.argv[0].replace("parent", "model")], check=True)
print("a word before")
print('{"load_s": 1.5}')
"""


@LINUX
@pytest.mark.parametrize(("watched", "mebibytes"), [("/model.py", 64), ("/parent.py", 256)])
def test_memory_is_that_of_the_watched_process(
    watched: str, mebibytes: int, tmp_path: Path
) -> None:
    parent, model = tmp_path / "parent.py", tmp_path / "model.py"
    parent.write_text(PARENT)
    model.write_text(MODEL)
    turn = run_turn([sys.executable, parent], watched)
    assert turn.figures == {"load_s": 1.5}
    peak = turn.memory.peak_anonymous_bytes
    assert peak is not None
    assert turn.memory.peak_bytes is not None
    assert mebibytes << 20 < peak <= turn.memory.peak_bytes < (mebibytes + 40) << 20


def test_a_program_that_fails_says_why() -> None:
    with pytest.raises(SessionError, match=r"exit code 3:\nno such model"):
        run_turn(
            [
                sys.executable,
                "-c",
                "import sys; print('no such model', file=sys.stderr); sys.exit(3)",
            ],
            "x",
        )


def test_a_program_that_is_killed_says_so() -> None:
    with pytest.raises(SessionError, match=r"was killed \(memory ran out\?\)"):
        run_turn([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], "x")


def test_a_rival_that_is_missing_is_told_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(RIVALS["llama.cpp"], modules=("json", "no_such_module"))
    monkeypatch.setitem(RIVALS, "llama.cpp", missing)
    with pytest.raises(
        BackendUnavailableError,
        match=r"lacks no_such_module, which llama.cpp needs.*\n.*\n.*pip install torch",
    ):
        check_installed(Path(sys.executable), ["llama.cpp"])


def test_an_interpreter_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=r"is not a Python that runs"):
        check_installed(tmp_path / "python", ["llama.cpp"])

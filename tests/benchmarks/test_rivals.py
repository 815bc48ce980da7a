"""The command: everyone's turns, what is kept of them, and the command's line in the results."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rivals
from benchmarks.rivals import repeatable_command, take_turns, unused
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase

CASE = BenchCase(prompt_tokens=4, new_tokens=3)
RIVAL = "transformers"
ROUND = {"ttft_s": 0.5, "step_s": [0.1, 0.1]}
FIGURES: dict[str, dict[str, Any]] = {
    OURS: {
        "contenders": [{"description": "onnxruntime on cpu", "load_s": 0.5}],
        "measurements": [{"rounds": [ROUND]}],
        "roofline": None,
        "environment": {"date": "2026-11-23 04:00 UTC", "CPU": "a CPU"},
    },
    RIVAL: {"load_s": 1.0, "rounds": [ROUND], "versions": {"transformers": "5.23.0"}},
}
# A program that prints its figures, and does something else in one of its turns.
PROGRAM = """
import os, pathlib, signal, sys, time
turns, special, instead, figures = sys.argv[1:]
with open(turns, "a+") as file:
    file.write("x")
if len(pathlib.Path(turns).read_text()) == int(special):
    exec(instead)
print(figures)
"""
FAIL = "sys.exit('no more')"
CTRL_C = "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"


@pytest.fixture
def commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, list[str | Path]]]:
    """Return `commands(name, turn, instead)`: of all, one of whom does something else in a turn."""
    monkeypatch.setattr(rivals, "read_bandwidth", lambda _: 2e10)

    def of_all(name: str, turn: int, instead: str) -> dict[str, list[str | Path]]:
        program = [sys.executable, "-c", PROGRAM]
        return {
            x: [*program, tmp_path / x, str(turn if x == name else 0), instead, json.dumps(figures)]
            for x, figures in FIGURES.items()
        }

    return of_all


@pytest.fixture
def run_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Any], tuple[object, str, list[Path]]]:
    """Return a function that runs the program on commands: exit code, stderr and results."""

    def run(commands: Any) -> tuple[object, str, list[Path]]:
        results = tmp_path / "results"
        results.mkdir()
        monkeypatch.setattr(rivals, "_commands", lambda *_: commands)
        words = ["--rivals-python", sys.executable, "--rival", RIVAL, "--results", str(results)]
        monkeypatch.setattr(sys, "argv", ["rivals", *words])
        with pytest.raises(SystemExit) as end:
            rivals.main()
        return end.value.code, capsys.readouterr().err, list(results.iterdir())

    return run


def test_a_rival_that_fails_is_left_out_from_then_on(commands: Any, tmp_path: Path) -> None:
    reports = list(take_turns("g2b", CASE, commands(RIVAL, 2, FAIL), rounds=3, threads=1))
    counts = [[len(x.rounds) for x in report.measurements] for report in reports]
    assert counts == [[1, 1], [2, 1], [3, 1]]
    assert [x.skipped for x in reports[-1].contenders] == [None, "failed in round 2"]
    assert (tmp_path / RIVAL).read_text() == "xx"


@pytest.mark.parametrize(
    ("whose", "instead", "code", "message"),
    [(OURS, FAIL, 1, "no more"), (RIVAL, CTRL_C, 130, "Interrupted: the rounds that were whole")],
)
def test_a_run_that_ends_early_keeps_its_whole_rounds(
    whose: str, instead: str, code: int, message: str, commands: Any, run_to_its_end: Any
) -> None:
    ended, stderr, (file,) = run_to_its_end(commands(whose, 3, instead))
    assert ended == code
    assert message in stderr
    rows = [line.split(" | ") for line in file.read_text().splitlines() if line.endswith(" | 2 |")]
    assert [row[0].strip("| ") for row in rows] == [OURS, RIVAL]


def test_the_command_in_a_result_names_no_path_of_this_machine() -> None:
    words = ["--shape", "g2b", "--folder=/home/x/models", "--prompt-tokens", "256,4096"]
    words += ["--rivals-python", "/home/x/venv/bin/python", "--export-options", "--int4 --auto"]
    assert repeatable_command(words) == (
        "python -m benchmarks.rivals --shape g2b --prompt-tokens 256,4096 "
        "--export-options '--int4 --auto' --rivals-python rivals-venv/bin/python"
    )


def test_results_of_the_same_day_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "2026-11-23-rivals-g2b.md"
    names = []
    for _ in range(3):
        names.append(unused(path).name)
        unused(path).touch()
    assert names == [path.name, "2026-11-23-rivals-g2b-2.md", "2026-11-23-rivals-g2b-3.md"]

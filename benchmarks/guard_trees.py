"""Run the code of another tree than the one that is installed: for guard.py."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

PHASES = ("prefill", "decode")
NOT_COMPARED_EXIT_CODE = 2
_CHILD = Path(__file__).with_name("guard_child.py")
_MANIFEST = "manifest.json"


@contextlib.contextmanager
def checked_out(commit: str, folder: Path, repository: Path) -> Iterator[Path]:
    """Give a folder with the files of a commit, which must not exist yet; it is removed at the end."""

    def git(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = ["git", "-C", str(repository), *arguments]
        return subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - git

    if shutil.which("git") is None:
        fail("git is not installed; it is what gets the commit's files")
    added = git("worktree", "add", "--detach", str(folder), commit)
    if added.returncode:
        fail(f"git cannot check out {commit!r}: {added.stderr.strip()}")
    try:
        yield folder.resolve()
    finally:
        git("worktree", "remove", "--force", str(folder))


class Runner:
    """A process that runs rounds with one tree's code; a context manager that ends it."""

    def __init__(self, tree: Path, arguments: Sequence[str]) -> None:
        """Start it, and wait until the model is loaded."""
        self._tree = tree
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            _child_command(arguments),
            env=environment(tree),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with _closed_on_error(self):
            # What a tree does not have, an editable installation would lend it.
            for module in self._answer()["modules"]:
                if not Path(module).is_relative_to(tree):
                    fail(f"{tree} was to be measured, but Python imported {module}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self) -> dict[str, float]:
        """Run a round; return the seconds of each phase by name."""
        assert self._process.stdin is not None  # noqa: S101 - it was started with a pipe
        with contextlib.suppress(BrokenPipeError):  # it ended, which its answer says
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        answer = self._answer()
        return {phase: answer[f"{phase}_s"] for phase in PHASES}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 - it was started with a pipe
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            fail(f"the model did not run with the code in {self._tree}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def model_of(tree: Path, model: Path, export: Sequence[str], output: Path) -> Path:
    """Return the bundle that a tree is to run: the given one, or the checkpoint as it exports it."""
    if (model / _MANIFEST).is_file():
        if export:
            fail(f"--export is for checkpoints, and {model} is a bundle: leave it out")
        return model
    command = [sys.executable, "-P", "-m", "gemma_deploy", "export", str(model)]
    command += ["--output", str(output), *export]
    done = subprocess.run(command, check=False, env=environment(tree), stdout=sys.stderr)  # noqa: S603 - our own program
    if done.returncode:
        fail(f"{model} could not be exported with the code in {tree}; the error is above")
    return output


def count_instructions(tree: Path, arguments: Sequence[str]) -> float | None:
    """Return the instructions of a round, None where they cannot be counted.

    Two counts that differ in the number of rounds leave start and loading out.
    """
    counts = [_count(tree, arguments, rounds) for rounds in (1, 3)]
    if counts[0] is None or counts[1] is None:
        return None
    return (counts[1] - counts[0]) / 2


def parse_perf(text: str) -> int | None:
    """Return the count in the output of `perf stat -x ,`; None for `<not supported>` and the like."""
    for line in text.splitlines():
        count, _, rest = line.partition(",")
        if "instructions" in rest and count.isdigit():
            return int(count)
    return None


def environment(tree: Path) -> dict[str, str]:
    """Return the environment in which Python finds a tree's packages before the installed ones."""
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Sets of strings in another order would change the number of instructions.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}


def fail(message: str) -> NoReturn:
    """End the program: nothing could be compared."""
    print(f"guard: {message}", file=sys.stderr)
    raise SystemExit(NOT_COMPARED_EXIT_CODE)


def _count(tree: Path, arguments: Sequence[str], rounds: int) -> int | None:
    if shutil.which("perf") is None:
        return None
    with tempfile.NamedTemporaryFile("r", suffix=".csv") as output:
        perf = ["perf", "stat", "-x", ",", "-e", "instructions:u", "-o", output.name, "--"]
        done = subprocess.run(  # noqa: S603 - perf and our own program
            [*perf, *_child_command(arguments)],
            check=False,
            input="\n" * rounds,
            env=environment(tree),
            capture_output=True,
            text=True,
        )
        return parse_perf(output.read()) if done.returncode == 0 else None


@contextlib.contextmanager
def _closed_on_error(runner: Runner) -> Iterator[None]:
    """End the process of a runner whose making fails: no `with` has it yet."""
    try:
        yield
    except BaseException:
        runner.__exit__()
        raise


def _child_command(arguments: Sequence[str]) -> list[str]:
    # -P keeps this folder off the path: only the tree's own code is measured.
    return [sys.executable, "-P", str(_CHILD), *arguments]

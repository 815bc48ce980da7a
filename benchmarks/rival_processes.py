"""A contender's turn: a fresh process, watched from outside while it runs (`run_turn`)."""

import json
import re
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from benchmarks.rival_models import ROOT
from gemma_deploy.errors import SessionError

_INTERVAL_S: Final = 0.05
_KIB: Final = 1024
_SHOWN_CHARACTERS: Final = 2000


@dataclass(slots=True)
class Memory:
    """The most memory that any one of the watched processes had; None before it was seen.

    Attributes:
        peak_bytes: Largest resident memory, file pages that are mapped included.
        peak_anonymous_bytes: Largest resident memory that no file backs.
    """

    peak_bytes: int | None = None
    peak_anonymous_bytes: int | None = None

    def note(self, status: str) -> None:
        """Take in the text of a /proc/PID/status."""
        sizes = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB$", status, re.MULTILINE))
        if len(sizes) == 2:  # a process that is ending has none
            self.peak_bytes = max(self.peak_bytes or 0, int(sizes["VmHWM"]) * _KIB)
            anonymous_bytes = int(sizes["RssAnon"]) * _KIB
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes or 0, anonymous_bytes)


@dataclass(frozen=True, slots=True)
class Turn:
    """What a process said, and the memory it took.

    Attributes:
        figures: The JSON object on its last line of stdout.
        memory: Of the process that holds the model.
    """

    figures: dict[str, Any]
    memory: Memory = field(default_factory=Memory)


def run_turn(
    command: Sequence[str | Path], watched: str, *, interval_s: float = _INTERVAL_S
) -> Turn:
    """Run a program in the repository's root and read its memory now and then (on Linux).

    Args:
        command: Its command line. Its last line of stdout is one JSON object.
        watched: Part of the command line of the process that holds the model: the program itself or
            a child of it.
        interval_s: Time between two looks at its memory.

    Raises:
        SessionError: It failed, or was killed.
    """
    arguments = [str(part) for part in command]
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        # Files, not pipes: nobody reads while the program runs.
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=stdout, stderr=stderr)  # noqa: S603 - our own command lines
        try:
            with _watching(process.pid, watched, interval_s) as memory:
                code = process.wait()
        finally:
            process.kill()
            process.wait()
        lines = _text(stdout).splitlines()
        if code or not lines:
            how = "was killed (memory ran out?)" if code == -9 else f"ended with exit code {code}"
            raise SessionError(
                f"{shlex.join(arguments)} {how}:\n{_text(stderr)[-_SHOWN_CHARACTERS:].strip()}"
            )
    return Turn(json.loads(lines[-1]), memory)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


@contextmanager
def _watching(pid: int, watched: str, interval_s: float) -> Iterator[Memory]:
    memory, is_over = Memory(), threading.Event()

    def watch() -> None:
        while not is_over.wait(interval_s):
            for process in _family(pid):
                if watched in _read(process, "cmdline").replace("\0", " "):
                    memory.note(_read(process, "status"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        is_over.set()
        thread.join()


def _family(pid: int) -> Iterator[int]:
    """Yield a process and all that it started."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text(encoding="ascii").split()
        except OSError:  # it ended since
            continue
        for child in children:
            yield from _family(int(child))


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it ended since
        return ""

"""Runs changed files through their readers, in processes that may die: `run_inputs`."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.fuzz.kinds import KINDS, prepared

ROOT = Path(__file__).parents[2]
CPU_LIMIT_S = 10.0
"""Computing that one input may take."""
WAIT_LIMIT_S = 120.0
"""Waiting for one input's end, on a machine however busy."""
MEMORY_LIMIT_BYTES = 3 << 30
"""Memory of a process; beyond it allocations fail."""

Outcome = Literal["raw", "dead", "slow"]


@dataclass(frozen=True)
class Input:
    """A changed file.

    Attributes:
        kind: Which, a key of `KINDS`.
        source: The seed that it is changed by, or the path of a file to be read in its place.
    """

    kind: str
    source: int | str


@dataclass(frozen=True)
class Finding:
    """An input that was not answered by a result or a `GemmaDeployError`."""

    input: Input
    outcome: Outcome
    detail: str


@dataclass
class Tally:
    """What became of some inputs."""

    num_inputs: int = 0
    num_refused: int = 0
    findings: list[Finding] = field(default_factory=list)

    def count(self, outcome: Outcome) -> int:
        """Return how many findings are of an outcome."""
        return sum(1 for x in self.findings if x.outcome == outcome)


def run_inputs(inputs: Sequence[Input], fixtures: Path) -> Tally:
    """Give each input to its reader, in a process that is replaced when it dies."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "inputs.json"
        plan.write_text(json.dumps([(x.kind, x.source) for x in inputs]))
        start = 0
        while start < len(inputs):
            start = _run_process(tally, inputs, start, [str(plan), str(start), str(fixtures)])
    return tally


def _run_process(
    tally: Tally, inputs: Sequence[Input], start: int, arguments: Sequence[str]
) -> int:
    """Run inputs until all are done, or the process dies or hangs; return where to go on."""
    command = [sys.executable, "-m", "tests.fuzz.driver", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    lines: queue.Queue[str | None] = queue.Queue()
    at = start - 1
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment
        ) as process,
    ):
        reader = threading.Thread(target=_forward, args=(process, lines))
        reader.start()
        try:
            while (line := lines.get(timeout=WAIT_LIMIT_S)) is not None:
                event = json.loads(line)
                if "begun" in event:
                    at = event["begun"]
                    continue
                _count(tally, inputs[at], event)
                if at == len(inputs) - 1:
                    return len(inputs)
            detail = f"exit code {process.wait()}"
        except queue.Empty:
            detail = f"no end within {WAIT_LIMIT_S:.0f} s"
        finally:
            process.kill()
            reader.join()
        log.seek(0)
        text = log.read()
    if at < start:
        raise RuntimeError(f"no input was begun ({detail}): {text[-2000:]}")
    tally.num_inputs += 1
    tally.findings.append(Finding(inputs[at], "dead", detail))
    return at + 1


def _count(tally: Tally, given: Input, event: dict[str, Any]) -> None:
    tally.num_inputs += 1
    tally.num_refused += event["outcome"] == "refused"
    if event["outcome"] in ("raw", "slow"):
        tally.findings.append(Finding(given, event["outcome"], event["detail"]))


def _forward(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):  # libraries print, too
            lines.put(line)
    lines.put(None)


def _answers(inputs: Sequence[Input], start: int, fixtures: Path) -> Iterator[dict[str, object]]:
    """Yield what becomes of each input; this runs in a process of its own."""
    from gemma_deploy.errors import GemmaDeployError

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        for at, chosen in enumerate(inputs[start:], start):
            kind = KINDS[chosen.kind]
            yield {"begun": at}
            folder = prepared(kind, fixtures, Path(scratch), chosen.source)
            outcome, detail = "read", ""
            began_s = time.process_time()
            try:
                kind.read(folder)
            except GemmaDeployError as err:
                outcome = "refused"
                str(err).encode()
            except BaseException as err:  # noqa: BLE001  panics of Rust are no Exceptions
                where = traceback.extract_tb(err.__traceback__)[-1]
                place = f"{Path(where.filename).name}:{where.lineno}"
                outcome, detail = "raw", f"{type(err).__name__}: {str(err)[:150]!a} at {place}"
            spent_s = time.process_time() - began_s
            if outcome != "raw" and spent_s > CPU_LIMIT_S:
                outcome, detail = "slow", f"{spent_s:.1f} s"
            yield {"outcome": outcome, "detail": detail}


def _main(plan: str, start: str, fixtures: str) -> None:
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    inputs = [Input(kind, source) for kind, source in json.loads(Path(plan).read_text())]
    for answer in _answers(inputs, int(start), Path(fixtures)):
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    _main(*sys.argv[1:])

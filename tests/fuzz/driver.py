"""Runs changed files through their readers, in processes that may die: `run_kind`."""

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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
class Finding:
    """An input that was not answered by a result or a `GemmaDeployError`."""

    kind: str
    seed: int
    outcome: Outcome
    detail: str


@dataclass
class Tally:
    """What became of a kind's inputs."""

    kind: str
    num_inputs: int = 0
    num_refused: int = 0
    findings: list[Finding] = field(default_factory=list)

    def count(self, outcome: Outcome) -> int:
        """Return how many findings are of an outcome."""
        return sum(1 for x in self.findings if x.outcome == outcome)


def run_kind(kind: str, seeds: range, fixtures: Path) -> Tally:
    """Give a kind's reader one input for each seed, in a process that is replaced when it dies."""
    tally = Tally(kind)
    start = seeds.start
    while start < seeds.stop:
        start = _run_process(tally, range(start, seeds.stop), fixtures)
    return tally


def _run_process(tally: Tally, seeds: range, fixtures: Path) -> int:
    """Run inputs until all are done, or the process dies or hangs; return the seed to go on with."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.driver",
        tally.kind,
        str(seeds.start),
        str(seeds.stop),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, str(fixtures)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_forward, args=(process, lines), daemon=True).start()
    seed = seeds.start - 1
    try:
        while (line := lines.get(timeout=WAIT_LIMIT_S)) is not None:
            event = json.loads(line)
            if "begun" in event:
                seed = event["begun"]
                continue
            tally.num_inputs += 1
            tally.num_refused += event["outcome"] == "refused"
            if event["outcome"] in ("raw", "slow"):
                finding = Finding(tally.kind, seed, event["outcome"], event["detail"])
                tally.findings.append(finding)
            if seed == seeds.stop - 1:
                return seeds.stop
        detail = f"exit code {process.wait()}"
    except queue.Empty:
        detail = f"no end within {WAIT_LIMIT_S:.0f} s"
    finally:
        process.kill()
        process.wait()
    if seed < seeds.start:
        raise RuntimeError(f"{tally.kind}: no input was begun ({detail})")
    tally.num_inputs += 1
    tally.findings.append(Finding(tally.kind, seed, "dead", detail))
    return seed + 1


def _forward(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):  # libraries print, too
            lines.put(line)
    lines.put(None)


def _answers(kind: str, seeds: range, fixtures: Path) -> Iterator[dict[str, object]]:
    """Yield what becomes of each input; this runs in a process of its own."""
    from gemma_deploy.errors import GemmaDeployError

    warnings.simplefilter("ignore")
    chosen = KINDS[kind]
    with tempfile.TemporaryDirectory() as scratch:
        fresh = prepared(chosen, fixtures, Path(scratch))
        for seed in seeds:
            folder, raw = next(fresh)
            yield {"begun": seed}
            chosen.changed(folder, raw, seed)
            outcome, detail = "read", ""
            began_s = time.process_time()
            try:
                chosen.read(folder)
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


def _main(kind: str, start: str, stop: str, fixtures: str) -> None:
    with contextlib.suppress(ImportError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for answer in _answers(kind, range(int(start), int(stop)), Path(fixtures)):
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    _main(*sys.argv[1:])

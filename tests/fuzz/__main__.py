"""`python -m tests.fuzz --minutes 60`: changed files for every reader, and a table of what came of it."""

import argparse
import tempfile
import time
from pathlib import Path

from tests.fuzz.driver import Tally, run_kind
from tests.fuzz.kinds import KINDS, build_fixtures


def main() -> int:
    """Run rounds of all kinds until the time, or the number of inputs, is reached."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to go on")
    parser.add_argument("--inputs", type=int, help="how many of each kind, in place of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the first input of each kind")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of all by default")
    parser.add_argument("--batch", type=int, default=200, help="inputs of a kind in a row")
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    tallies = {kind: Tally(kind) for kind in kinds}
    end_s = time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        build_fixtures(Path(folder))
        start = options.seed
        while not _is_done(options, start, end_s):
            stop = start + options.batch
            if options.inputs is not None:
                stop = min(stop, options.seed + options.inputs)
            for kind in kinds:
                _add(tallies[kind], run_kind(kind, range(start, stop), Path(folder)))
            start = stop
    _print(list(tallies.values()))
    return 1 if any(tally.findings for tally in tallies.values()) else 0


def _is_done(options: argparse.Namespace, start: int, end_s: float) -> bool:
    if options.inputs is not None:
        return bool(start >= options.seed + options.inputs)
    return time.monotonic() >= end_s


def _add(tally: Tally, new: Tally) -> None:
    tally.num_inputs += new.num_inputs
    tally.num_refused += new.num_refused
    tally.findings += new.findings
    for finding in new.findings:
        print(f"{finding.outcome} {finding.kind} {finding.seed}: {finding.detail}", flush=True)  # noqa: T201


def _print(tallies: list[Tally]) -> None:
    rows = [
        (x.kind, x.num_inputs, x.num_refused, x.count("raw"), x.count("dead"), x.count("slow"))
        for x in tallies
    ]
    total = ("all", *(sum(row[i] for row in rows) for i in range(1, 6)))  # type: ignore[misc]  # numbers but for the first
    print("| kind | inputs | refused | raw | dead | slow |\n| --- | --: | --: | --: | --: | --: |")  # noqa: T201
    for row in (*rows, total):
        print("| " + " | ".join(f"{x:,}" if isinstance(x, int) else x for x in row) + " |")  # noqa: T201


if __name__ == "__main__":
    raise SystemExit(main())

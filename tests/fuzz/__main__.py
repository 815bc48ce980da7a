"""`python -m tests.fuzz --minutes 60`: changed files for every reader, and a table of what came of it."""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from tests.fuzz.driver import Finding, Input, Tally, run_inputs
from tests.fuzz.kinds import KINDS, build_fixtures, prepared


def main() -> int:
    """Run rounds of all kinds until the time, or the number of inputs, is reached."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to go on")
    parser.add_argument("--inputs", type=int, help="how many of each kind, in place of --minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the first input of each kind")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of all by default")
    parser.add_argument("--keep", type=Path, help="folder for the files that were found")
    parser.add_argument("--batch", type=int, default=200, help="inputs of a kind in a row")
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    tallies = {kind: Tally() for kind in kinds}
    end_s = time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        build_fixtures(Path(folder))
        start = options.seed
        while not _is_done(options, start, end_s):
            stop = start + options.batch
            if options.inputs is not None:
                stop = min(stop, options.seed + options.inputs)
            for kind in kinds:
                inputs = [Input(kind, seed) for seed in range(start, stop)]
                new = run_inputs(inputs, Path(folder))
                _add(tallies[kind], new)
                for finding in new.findings:
                    _report(finding, Path(folder), options.keep)
            start = stop
    _print(tallies)
    return 1 if any(tally.findings for tally in tallies.values()) else 0


def _is_done(options: argparse.Namespace, start: int, end_s: float) -> bool:
    if options.inputs is not None:
        return bool(start >= options.seed + options.inputs)
    return time.monotonic() >= end_s


def _add(tally: Tally, new: Tally) -> None:
    tally.num_inputs += new.num_inputs
    tally.num_refused += new.num_refused
    tally.findings += new.findings


def _report(finding: Finding, fixtures: Path, keep: Path | None) -> None:
    kind, source = finding.input.kind, finding.input.source
    print(f"{finding.outcome} {kind} {source}: {finding.detail}", flush=True)  # noqa: T201
    if keep is not None:
        (keep / kind).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = prepared(KINDS[kind], fixtures, Path(scratch), source)
            shutil.copy(folder / KINDS[kind].file, keep / kind / f"{finding.outcome}-{source}")


def _print(tallies: dict[str, Tally]) -> None:
    rows = [
        (name, x.num_inputs, x.num_refused, x.count("raw"), x.count("dead"), x.count("slow"))
        for name, x in tallies.items()
    ]
    total = [sum(numbers) for numbers in zip(*(row[1:] for row in rows), strict=True)]
    print("| kind | inputs | refused | raw | dead | slow |\n| --- | --: | --: | --: | --: | --: |")  # noqa: T201
    for name, *numbers in (*rows, ("all", *total)):
        print(f"| {name} | {' | '.join(f'{x:,}' for x in numbers)} |")  # noqa: T201


if __name__ == "__main__":
    raise SystemExit(main())

"""Measure gemma-deploy beside llama.cpp, onnxruntime-genai and transformers on a CPU.

    python -m benchmarks.rivals --shape g270m --shape g2b --rivals-python rivals-venv/bin/python

Run it in the repository's root. It makes a random checkpoint of each shape and converts it for everyone
(kept in --folder for the next time; up to 15 GB, and onnxruntime-genai's builder takes 20 GB of memory
at g2b), then lets all take turns, round after round, each in a fresh process: the machine's speed
drifts, so only ratios within a round mean something. Written are a file for each shape to
benchmarks/results/, anew after every round, so that a run can be stopped in the middle; a table to
stdout, and one JSON object as its last line. Rivals live in an environment of their own, which --help
says how to set up; ours needs none of it.
"""

import argparse
import datetime as dt
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.arguments import two_or_more, whole_number, whole_numbers
from benchmarks.rival_contenders import RIVALS, SETUP, check_installed
from benchmarks.rival_models import OURS_COMMAND, ROOT, RivalModels
from benchmarks.rival_processes import Turn, run_turn
from benchmarks.rival_results import BANDWIDTH, build_report, memory_rows, to_markdown
from benchmarks.shapes import SHAPES, shape_config
from gemma_deploy.cli.bench_tables import print_report
from gemma_deploy.cli.console import emit_columns
from gemma_deploy.errors import GemmaDeployError, SessionError
from gemma_deploy.runtime.benchmark.bandwidth import read_bandwidth
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase, BenchReport

_PROGRAMS: Final = "benchmarks.rival_programs"
_OUR_WORKER: Final = "gemma_deploy.runtime.benchmark.worker"
_EXPORT_OPTIONS: Final = "--int4 --method rtn --block-size 128 --graphs onnxruntime"


def take_turns(
    shape: str,
    case: BenchCase,
    commands: Mapping[str, Sequence[str | Path]],
    *,
    rounds: int,
    threads: int,
) -> Iterator[BenchReport]:
    """Run a case, and yield a report of all rounds so far after each of them.

    Args:
        shape: Name of what is run.
        case: What is run.
        commands: Everyone's command line, by name.
        rounds: How many.
        threads: How many read memory when its bandwidth is measured.

    Raises:
        SessionError: Ours failed; rivals that do are left out from then on.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in commands}
    failures: dict[str, str] = {}
    bandwidths = [read_bandwidth(threads)]
    for number in range(rounds):
        running = [name for name in commands if name not in failures]
        shift = number % len(running)
        # Nobody always follows the same neighbour.
        for name in running[shift:] + running[:shift]:
            watched = _OUR_WORKER if name == OURS else _PROGRAMS
            _say(f"{shape}, {case}, round {number + 1} of {rounds}: {name} ...")
            started_s = time.perf_counter()
            try:
                turns[name].append(run_turn(commands[name], watched))
            except SessionError as err:
                if name == OURS:
                    raise
                failures[name] = f"failed in round {number + 1}"
                _say(str(err))
            _say(f"  {time.perf_counter() - started_s:.0f} s")
        bandwidths.append(read_bandwidth(threads))
        yield build_report(shape, case, turns, failures, bandwidths)


def _commands(args: argparse.Namespace, shape: str, case: BenchCase) -> dict[str, list[str | Path]]:
    """Return everyone's command line, ours first, once their models are there."""
    models = RivalModels(args.folder, shape, args.rivals_python)
    lengths = ["--prompt-tokens", str(case.prompt_tokens), "--new-tokens", str(case.new_tokens)]
    shared = [*lengths, "--threads", str(args.threads)]
    ours: list[str | Path] = [*OURS_COMMAND, "bench", models.bundle(args.export_options), *shared]
    ours += ["--device", "cpu", "--rounds", str(args.repeats), "--json"]
    commands: dict[str, list[str | Path]] = {OURS: [*ours, *shlex.split(args.bench_options)]}
    vocab_size = str(shape_config(shape).vocab_size)
    for name in args.rival:
        rival = RIVALS[name]
        program = [args.rivals_python, "-m", f"{_PROGRAMS}.{rival.program}"]
        settings = [word for setting in rival.settings for word in ("--set", setting)]
        counts = ["--repeats", str(args.repeats), "--vocab-size", vocab_size]
        commands[name] = [*program, models.of(rival.model), *shared, *counts, *settings]
    return commands


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"To set up the rivals' environment:\n\n{SETUP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, action="append", help="repeatable (g270m)")
    add("--rival", choices=RIVALS, action="append", help="repeatable (all)")
    add("--rivals-python", type=Path, required=True, help="the Python that rivals run on")
    add("--prompt-tokens", type=whole_numbers, default=(256,), help="lengths, with commas (256)")
    add("--new-tokens", type=two_or_more, default=64, help="tokens to generate (64)")
    add("--threads", type=whole_number, default=2, help="threads of everyone's kernels (2)")
    add("--rounds", type=whole_number, default=5, help="turns of each, in a fresh process (5)")
    add("--repeats", type=whole_number, default=3, help="rounds to time within a process (3)")
    add("--export-options", default=_EXPORT_OPTIONS, help=f'our bundle\'s ("{_EXPORT_OPTIONS}")')
    add("--bench-options", default="", help="more options for `gemma-deploy bench`")
    add("--folder", type=Path, default=ROOT / "build" / "rivals", help="models (build/rivals)")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where files go")
    args = parser.parse_args(words)
    if not args.results.is_dir():
        parser.error(f"--results {args.results} is not a folder: make it, or give another")
    args.shape = list(dict.fromkeys(args.shape or ["g270m"]))
    args.rival = list(dict.fromkeys(args.rival or RIVALS))
    # Not resolve(): a virtual environment's Python is a link, and what it is depends on its place.
    args.rivals_python = args.rivals_python.absolute()
    return args


def repeatable_command(words: Sequence[str]) -> str:
    """Return a command line that means the same on another machine: without this one's paths."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--rivals-python", "--folder", "--results"):
        parser.add_argument(name)
    _, others = parser.parse_known_args(words)
    python = ["--rivals-python", "rivals-venv/bin/python"]
    return shlex.join(["python", "-m", "benchmarks.rivals", *others, *python])


def _run(args: argparse.Namespace, command: str) -> dict[str, list[object]]:
    """Measure every shape and return everything, for programs."""
    found: dict[str, list[object]] = {}
    for shape in args.shape:
        kept: Path | None = None
        reports: list[BenchReport] = []
        for prompt_tokens in args.prompt_tokens:
            case = BenchCase(prompt_tokens=prompt_tokens, new_tokens=args.new_tokens)
            commands = _commands(args, shape, case)
            for report in take_turns(
                shape, case, commands, rounds=args.rounds, threads=args.threads
            ):
                date = dt.datetime.now(dt.UTC).date()
                kept = kept or unused(args.results / f"{date}-rivals-{shape}.md")
                _replace(kept, to_markdown(shape, [*reports, report], command))
                _say(f"  kept in {kept}")
            reports.append(report)
            print_report(report)
            emit_columns(memory_rows(report), title="Our memory and load time beside theirs")
            print(f"{BANDWIDTH}: {report.environment[BANDWIDTH]}")
        found[shape] = [report.to_dict() for report in reports]
    return found


def _replace(file: Path, text: str) -> None:
    """Write a file that is the old or the new one, never a part."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def unused(path: Path) -> Path:
    """Return the path, or the first of NAME-2, NAME-3, ... that is not there: results are kept."""
    names = itertools.chain([path.stem], (f"{path.stem}-{number}" for number in itertools.count(2)))
    candidates = (path.with_name(f"{name}{path.suffix}") for name in names)
    return next(candidate for candidate in candidates if not candidate.exists())


def main() -> None:
    """Measure, print tables and a line of JSON; the exit code is that of an error, if there is one."""
    args = _arguments(sys.argv[1:])
    command = repeatable_command(sys.argv[1:])
    try:
        check_installed(args.rivals_python, args.rival)
        found = _run(args, command)
    except GemmaDeployError as err:
        _say(f"Error: {err}")
        raise SystemExit(err.exit_code) from err
    except KeyboardInterrupt:
        _say("Interrupted: the rounds that were whole are kept.")
        raise SystemExit(130) from None
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Measure what a user waits for, and the memory a loaded model takes, its tokenizer included.

    python -m benchmarks.load BUNDLE [BUNDLE ...]

Each bundle is loaded with `gemma_deploy.load`, without and with a cache of prepacked weights, and
generates one token. All take turns in fresh processes, with the files in the page cache; the cache is
filled beforehand. Medians and ranges over the rounds are printed as a table, and one JSON object as the
last line of stdout. Private memory is RssAnon once the first token is there.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.arguments import whole_number
from benchmarks.markdown import table
from benchmarks.rival_processes import run_turn
from gemma_deploy.errors import GemmaDeployError
from gemma_deploy.runtime.benchmark.results import Spread

Figures = Mapping[str, float]
FIGURES: Final = {
    "load_s": "load, s",
    "first_token_s": "first token after the start, s",
    "cpu_s": "CPU, s",
    "private_mb": "private, MB",
    "peak_mb": "peak, MB",
}
_CHILD: Final = "benchmarks.load_child"


def measure(bundle: Path, cache: Path | None, threads: int) -> Figures:
    """Load a bundle and generate a token in a process of its own.

    Raises:
        SessionError: It failed.
    """
    command = [sys.executable, "-m", _CHILD, str(bundle), str(cache or ""), str(threads)]
    return run_turn([*command, repr(time.monotonic())], _CHILD).figures


def summary(turns: Sequence[Figures]) -> dict[str, Spread]:
    """Return each figure over the rounds."""
    return {name: Spread.of([turn[name] for turn in turns]) for name in FIGURES}


def rows(found: Mapping[str, Mapping[str, Spread]]) -> list[list[str]]:
    """Return the table's cells, the head first: medians, and ranges in brackets."""
    head = ["bundle", *FIGURES.values()]
    return [head, *([name, *map(_cell, figures.values())] for name, figures in found.items())]


def _cell(figure: Spread) -> str:
    middle, least, most = (
        f"{x:.0f}" if x >= 10 else f"{x:.2f}" for x in dataclasses.astuple(figure)
    )
    return f"{middle} ({least} to {most})"


def main() -> None:
    """Measure, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="+", help="bundle folders")
    parser.add_argument("--rounds", type=whole_number, default=5, help="turns of each (5)")
    parser.add_argument("--threads", type=whole_number, default=2, help="of the kernels (2)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gemma-deploy-load-") as scratch:
        places = {
            f"{x}, {way}": (x, Path(scratch) if way == "prepacked" else None)
            for x in args.bundle
            for way in ("plain", "prepacked")
        }
        turns: dict[str, list[Figures]] = {name: [] for name in places}
        try:
            for number in range(-1, args.rounds):  # the first fills the caches
                for name, (bundle, cache) in places.items():
                    figures = measure(bundle, cache, args.threads)
                    if number >= 0:
                        turns[name].append(figures)
        except GemmaDeployError as err:
            print(f"Error: {err}", file=sys.stderr)
            raise SystemExit(err.exit_code) from err
    found = {name: summary(x) for name, x in turns.items()}
    print(table(rows(found)))
    print(json.dumps(found, default=dataclasses.asdict))


if __name__ == "__main__":
    main()

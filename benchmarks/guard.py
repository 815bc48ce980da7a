"""Compare the speed of this tree with that of a commit, and flag a loss over 5 %.

    python -m benchmarks.guard COMMIT MODEL [--prompt-tokens 256] [--new-tokens 64] [--threads N]
    python -m benchmarks.guard main~10 build/demo-bundle
    python -m benchmarks.guard v0.1.0 checkpoint --export="--int4 --block-size 64"

COMMIT is checked out beside this tree (`git worktree`, in a scratch folder that is removed at the end);
this tree is taken as it is, changes that are not committed included. MODEL is a bundle that both
run, or a checkpoint that each exports for itself, so that what an exporter writes is compared too. Each
tree runs in a process of its own, on the CPU, batch 1, greedy; they take turns round by round, so that a
machine whose speed drifts treats both alike. Both use the packages that
are installed here.

A loss is a median ratio of times, this tree's over the commit's in the same round, above 1.05 for
prefill or decode, if the 95 % confidence interval of that median is above 1: a noisy machine needs more
--rounds to be sure, and a ratio above 1.05 that is not sure is marked as unclear. Where `perf stat` can count (Linux, kernel.perf_event_paranoid at most 2, no
virtual machine that hides the counters), instructions of a round are compared as well: on one thread,
since threads that wait spin; they hardly vary, but say nothing about memory.

The last line of stdout is one JSON object. The exit code is 0 without a loss, 1 with one, 2 if
nothing could be compared.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

from benchmarks.arguments import two_or_more, whole_number
from benchmarks.guard_trees import PHASES, Runner, checked_out, count_instructions, model_of

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One figure of both trees; less is better.

    Attributes:
        name: `prefill`, `decode` (seconds of a round) or `instructions` (of a round).
        before: The commit's median.
        now: This tree's median.
        ratio: Median of the ratios, now / before, round by round.
        lowest: What that median is at least, with 97.5 % confidence.
        highest: What it is at most, likewise.
    """

    name: str
    before: float
    now: float
    ratio: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, name: str, before: Sequence[float], now: Sequence[float]) -> "Comparison":
        """Compare figures of the same rounds."""
        ratios = sorted(b / a for a, b in zip(before, now, strict=True))
        outside = ratios_outside(len(ratios))
        return cls(
            name=name,
            before=statistics.median(before),
            now=statistics.median(now),
            ratio=statistics.median(ratios),
            lowest=ratios[outside],
            highest=ratios[-1 - outside],
        )

    def is_loss(self, limit_percent: float) -> bool:
        """Tell whether this tree is worse by more than the limit, and surely worse."""
        return self.ratio > 1 + limit_percent / 100 and self.lowest > 1


def ratios_outside(count: int) -> int:
    """Return how many ratios at each end are beyond the 95 % confidence interval of their median.

    As many tosses of a coin show fewer heads than that once in 40 times at most: whatever the
    ratios' distribution, half of it is above the median. Below 6 ratios no interval is that sure,
    and all of them are within.
    """
    tails = accumulate(math.comb(count, heads) for heads in range(count))
    outside: int = sum(tail <= 0.025 * 2**count for tail in tails)
    return max(0, outside - 1)


def time_rounds(
    before: Runner, now: Runner, rounds: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Run both by turns; return what each round took, after one that does not count.

    Each always follows the other: a process that goes on where it was finds the processor's caches
    as it left them, which was seen to make a prefill a third faster.
    """
    times: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for number in range(rounds + 1):
        for runner, taken in zip((before, now), times, strict=True):
            taken.append(runner.run())
        show_progress(number, rounds)
    return times[0][1:], times[1][1:]


def show_progress(done: int, total: int) -> None:
    """Say on stderr how far it is, on a terminal."""
    if sys.stderr.isatty():
        print(f"\rround {done} of {total}", end="\n" if done == total else "", file=sys.stderr)


def compare(args: argparse.Namespace, scratch: Path) -> list[Comparison]:
    """Run both trees and compare all that can be."""
    with checked_out(args.commit, scratch / "tree", ROOT) as old:
        trees = {"before": old, "now": ROOT}
        sizes = ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
        threads = [] if args.threads is None else ["--threads", str(args.threads)]
        export = shlex.split(args.export)
        models = {
            name: str(model_of(tree, args.model.resolve(), export, scratch / name))
            for name, tree in trees.items()
        }
        with (
            Runner(old, [models["before"], *sizes, *threads]) as first,
            Runner(ROOT, [models["now"], *sizes, *threads]) as second,
        ):
            before, now = time_rounds(first, second, args.rounds)
        found = [
            Comparison.of(phase, [x[phase] for x in before], [x[phase] for x in now])
            for phase in PHASES
        ]
        counts = {
            name: count_instructions(tree, [models[name], *sizes, "--threads", "1"])
            for name, tree in trees.items()
        }
    if counts["before"] is not None and counts["now"] is not None:
        found.append(Comparison.of("instructions", [counts["before"]], [counts["now"]]))
    return found


def table(found: Sequence[Comparison], limit_percent: float) -> Iterator[str]:
    """Yield the lines of a table."""
    yield f"{'':14} {'before':>12} {'now':>12} {'now / before':>13}  with 95 % confidence"
    for x in found:
        scale, unit = (1e-6, "M") if x.name == "instructions" else (1e3, "ms")
        is_above = x.ratio > 1 + limit_percent / 100
        mark = "  LOSS" if x.is_loss(limit_percent) else "  unclear" if is_above else ""
        yield (
            f"{f'{x.name}, {unit}':14} {x.before * scale:12.2f} {x.now * scale:12.2f} "
            f"{x.ratio:13.3f}  {x.lowest:.3f} to {x.highest:.3f}{mark}"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="what to compare with: a commit, tag or branch")
    parser.add_argument("model", type=Path, help="a bundle, or a checkpoint")
    parser.add_argument(
        "--export",
        default="",
        metavar="OPTIONS",
        help="for a checkpoint: options of `gemma-deploy export`, after =",
    )
    parser.add_argument("--prompt-tokens", type=whole_number, default=256, metavar="N")
    parser.add_argument(
        "--new-tokens",
        type=two_or_more,
        default=64,
        metavar="N",
        help="from 2 on: the first is prefill's",
    )
    parser.add_argument("--threads", type=whole_number, metavar="N", help="(one per core)")
    parser.add_argument("--rounds", type=whole_number, default=15, metavar="N")
    parser.add_argument("--limit-percent", type=float, default=5.0, metavar="X")
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"{args.model} is not a folder: give a bundle or a checkpoint")
    return args


def main() -> None:
    """Compare, print a table and a line of JSON; the exit code is 1 if something was lost."""
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="gemma-deploy-guard-") as scratch:
        found = compare(args, Path(scratch))
    lost = [x.name for x in found if x.is_loss(args.limit_percent)]
    print("\n".join(table(found, args.limit_percent)))
    if found[-1].name != "instructions":
        print("Instructions cannot be counted here: times alone decide.")
    body = {"limit_percent": args.limit_percent, "losses": lost}
    print(json.dumps(body | {"comparisons": [asdict(x) for x in found]}))
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()

"""What gpu.py found, as goals met or missed and as Markdown; nothing here needs a GPU."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.markdown import table
from gemma_deploy.cli.bench_rows import (
    Rows,
    contender_facts,
    cost_rows,
    latency_rows,
    rate_rows,
    roofline_facts,
    share_facts,
)
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase, BenchReport

Verdict = Literal["met", "missed", "not measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One backend in one dtype.

    Attributes:
        backend: What ran the bundle.
        dtype: What it and the baselines computed in.
        report: What was measured; None if nothing was.
        reason: Why nothing was.
    """

    backend: str
    dtype: str
    report: BenchReport | None = None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.backend}, {self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What decoding at batch 1 is to reach with the 2B shape.

    Attributes:
        text: What it is, for people.
        least: The least figure that meets it.
        figure: Returns the figure; None if it was not measured.
        show: Writes a figure for people.
    """

    text: str
    least: float
    figure: Callable[[BenchReport, BenchCase], float | None]
    show: Callable[[float], str]

    def verdict(self, figure: float | None) -> Verdict:
        """Judge a figure."""
        if figure is None:
            return "not measured"
        return "met" if figure >= self.least else "missed"


def _decode_ratio(baseline: str) -> Callable[[BenchReport, BenchCase], float | None]:
    def figure(report: BenchReport, case: BenchCase) -> float | None:
        ratios = report.ratios(baseline, case)
        return None if ratios is None else ratios[1].median

    return figure


def _bandwidth_share(report: BenchReport, case: BenchCase) -> float | None:
    ours = report.of(OURS, case)
    if report.roofline is None or ours is None:
        return None
    return report.roofline.decode_share(ours)


GOALS = (
    Goal(
        text="decode at least 3 times as fast as torch-eager",
        least=3.0,
        figure=_decode_ratio("torch-eager"),
        show="{:.2f}x".format,
    ),
    Goal(
        text="decode at least 1.1 times as fast as torch-compile",
        least=1.1,
        figure=_decode_ratio("torch-compile"),
        show="{:.2f}x".format,
    ),
    Goal(
        text="decode at no less than 75% of the copy bandwidth",
        least=0.75,
        figure=_bandwidth_share,
        show="{:.1%}".format,
    ),
)


def judged(runs: Sequence[Run], goal: Goal) -> list[tuple[Run, BenchCase | None, float | None]]:
    """Return a goal's figure for each run and each of its cases of batch 1."""
    found: list[tuple[Run, BenchCase | None, float | None]] = []
    for run in runs:
        report = run.report
        cases = [] if report is None else [x for x in report.cases() if x.batch_size == 1]
        if report is None or not cases:
            found.append((run, None, None))
            continue
        found += [(run, case, goal.figure(report, case)) for case in cases]
    return found


def overall(runs: Sequence[Run], goal: Goal) -> Verdict:
    """Judge the fastest backend: a goal is met where one run meets it at every length of prompts."""
    verdicts: dict[str, list[Verdict]] = {}
    for run, _, figure in judged(runs, goal):
        verdicts.setdefault(str(run), []).append(goal.verdict(figure))
    if any(set(found) == {"met"} for found in verdicts.values()):
        return "met"
    if any("not measured" not in found for found in verdicts.values()):
        return "missed"
    return "not measured"


def goal_rows(runs: Sequence[Run]) -> Rows:
    """Return every goal: for the fastest, and for each run and case."""
    rows: Rows = [("goal", "run", "case", "figure", "verdict")]
    for goal in GOALS:
        rows.append((goal.text, "any", "every", "", overall(runs, goal)))
        for run, case, figure in judged(runs, goal):
            shown = "" if figure is None else goal.show(figure)
            where = "" if case is None else str(case)
            rows.append(("", str(run), where, shown, goal.verdict(figure)))
    return rows


def best_decode(runs: Sequence[Run]) -> Run | None:
    """Return the run with the fastest decode of the first case; None if nothing was measured."""

    def rate(run: Run) -> float:
        if run.report is None or not run.report.measurements:
            return 0.0
        ours = run.report.of(OURS, run.report.cases()[0])
        return 0.0 if ours is None else statistics.median(ours.decode_rates())

    return max((run for run in runs if rate(run)), key=rate, default=None)


def markdown(title: str, command: str, environment: Mapping[str, str], runs: Sequence[Run]) -> str:
    """Return the file that is kept: the goals, each run's tables, and where they were measured."""
    lines = [f"# {title}", "", f"`{command}`", "", table([("", ""), *environment.items()])]
    lines += ["", "## Goals, for the 2B shape at batch 1", "", table(goal_rows(runs))]
    fastest = best_decode(runs)
    if fastest is not None:
        lines += ["", f"The fastest decode: {fastest}."]
    for run in runs:
        lines += ["", f"## {run}", "", *_run_lines(run)]
    return "\n".join(lines) + "\n"


def _run_lines(run: Run) -> Iterator[str]:
    if run.report is None:
        yield f"Did not run: {run.reason}"
        return
    report = run.report
    yield table([("contender", "what ran"), *contender_facts(report)])
    yield ""
    yield table(cost_rows(report))
    limits = roofline_facts(report)
    if limits:
        yield ""
        yield table([("the machine at its best, the model's needs", ""), *limits])
    for case in report.cases():
        yield from ("", f"### {case}", "")
        yield table(rate_rows(report, case))
        yield ""
        yield table(latency_rows(report, case))
        for phase, share in share_facts(report, case):
            yield from ("", f"{phase}: {share}.")

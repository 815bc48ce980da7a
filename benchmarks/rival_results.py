"""What was measured beside rivals, as a `BenchReport` and as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from benchmarks.markdown import bullets, table
from benchmarks.rival_contenders import RIVALS
from benchmarks.rival_processes import Turn
from gemma_deploy.cli.bench_rows import (
    Rows,
    contender_facts,
    cost_rows,
    format_figure,
    format_spread,
    latency_rows,
    rate_rows,
    roofline_facts,
    share_facts,
)
from gemma_deploy.runtime.benchmark.results import (
    OURS,
    BenchCase,
    BenchReport,
    Contender,
    Measurement,
    Roofline,
    RoundTimes,
    Spread,
)

BANDWIDTH: Final = "read bandwidth"
_HOW: Final = (
    "Contenders took turns, round after round, each turn in a fresh process with a warm-up of its own; "
    "figures are medians over the rounds (lowest to highest), ratios are taken within a round. Batch 1, "
    "random prompts, greedy, ends of text ignored. Memory is that of the process that holds the model, "
    "read from outside every 50 ms: the largest resident memory, and the largest that no file backs. "
    "Load time includes imports."
)


def middle_round(rounds: Sequence[Mapping[str, Any]]) -> RoundTimes:
    """Return one round for those of a process: the median time to the first token, the middle steps.

    Args:
        rounds: `ttft_s` and `step_s` of each, at least one.
    """
    by_steps = sorted(rounds, key=lambda found: sum(found["step_s"]))
    return RoundTimes(
        ttft_s=statistics.median(found["ttft_s"] for found in rounds),
        step_s=tuple(by_steps[(len(by_steps) - 1) // 2]["step_s"]),
    )


def our_rounds(figures: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the rounds in what `gemma-deploy bench --json` prints."""
    rounds: Sequence[Mapping[str, Any]] = figures["measurements"][0]["rounds"]
    return rounds


def build_report(
    shape: str,
    case: BenchCase,
    turns: Mapping[str, Sequence[Turn]],
    failures: Mapping[str, str],
    bandwidths: Sequence[float],
) -> BenchReport:
    """Return all turns of a case as one report; a round of it is what a process' rounds come to.

    Args:
        shape: Its name.
        case: What was run.
        turns: Those of each contender, in the order they ran; ours is there and has at least one.
        failures: Why contenders stopped, by name.
        bandwidths: Read bandwidths in bytes per second, measured between the rounds.
    """
    last = turns[OURS][-1].figures
    measured = Spread.of([rate / 1e9 for rate in bandwidths])
    versions: dict[str, str] = {}
    for name in turns:
        if name != OURS and turns[name]:
            versions |= turns[name][0].figures["versions"]
    beside = {f"{package} (rival)": version for package, version in versions.items()}
    return BenchReport(
        model=shape,
        contenders=tuple(_contender(name, turns[name], failures.get(name)) for name in turns),
        measurements=tuple(
            Measurement(contender=name, case=case, rounds=tuple(map(_round_of, found)))
            for name, found in turns.items()
            if found
        ),
        roofline=_roofline(last["roofline"], bandwidths),
        environment={**last["environment"], **beside, BANDWIDTH: format_spread(measured, " GB/s")},
    )


def _round_of(turn: Turn) -> RoundTimes:
    figures = turn.figures
    return middle_round(our_rounds(figures) if "measurements" in figures else figures["rounds"])


def _contender(name: str, turns: Sequence[Turn], failure: str | None) -> Contender:
    if name == OURS:
        ours = turns[-1].figures["contenders"][0]
        description = ours["description"]
        loads = [turn.figures["contenders"][0]["load_s"] for turn in turns]
    else:
        description = RIVALS[name].description
        loads = [turn.figures["load_s"] for turn in turns]
    return Contender(
        name=name,
        description=description,
        load_s=statistics.median(loads) if loads else None,
        peak_memory_bytes=_largest([turn.memory.peak_bytes for turn in turns]),
        peak_anonymous_bytes=_largest([turn.memory.peak_anonymous_bytes for turn in turns]),
        skipped=failure,
    )


def _largest(sizes: Sequence[int | None]) -> int | None:
    return max((size for size in sizes if size is not None), default=None)


def _roofline(raw: Mapping[str, Any] | None, bandwidths: Sequence[float]) -> Roofline | None:
    """Return ours with the bandwidth of the whole run, not that of its last round."""
    if raw is None:
        return None
    return Roofline(**{**raw, "read_bytes_per_s": statistics.median(bandwidths)})


def memory_rows(report: BenchReport) -> Rows:
    """Return our memory and load time as shares of each rival's: below 1 is less than theirs."""
    ours = report.contenders[0]
    rows: Rows = [("", "ours / its memory", "of it not files", "load time")]
    for rival in report.contenders[1:]:
        pairs = (
            (ours.peak_memory_bytes, rival.peak_memory_bytes),
            (ours.peak_anonymous_bytes, rival.peak_anonymous_bytes),
            (ours.load_s, rival.load_s),
        )
        rows.append((rival.name, *(format_figure(a / b) if a and b else "-" for a, b in pairs)))
    return rows


def to_markdown(shape: str, reports: Sequence[BenchReport], command: str) -> str:
    """Return the file for benchmarks/results/.

    Args:
        shape: Its name.
        reports: One for each case, at least one.
        command: What was typed.
    """
    date = reports[0].environment["date"].split()[0]
    parts = [
        f"# Beside the rivals, {shape}, {date}",
        f"`{command}`, random weights. {_HOW}",
        bullets(contender_facts(reports[0])),
    ]
    for report in reports:
        (case,) = report.cases()
        parts += [
            f"## {str(case).capitalize()}",
            table(rate_rows(report, case)),
            table(latency_rows(report, case)),
            table(cost_rows(report)),
            table(memory_rows(report)),
            bullets(
                [
                    (BANDWIDTH, report.environment[BANDWIDTH]),
                    *roofline_facts(report)[1:],  # without the bandwidth, which is the line above
                    *share_facts(report, case),
                ]
            ),
        ]
    environment = [(k, v) for k, v in reports[0].environment.items() if k != BANDWIDTH]
    return "\n\n".join([*parts, "## Environment", bullets(environment)]) + "\n"

"""Why figures of a benchmark may be noise: a machine that was busy, rounds that differ."""

from collections.abc import Iterator
from typing import Final

from gemma_deploy.cli.bench_rows import format_figure
from gemma_deploy.runtime.benchmark.results import LOAD, BenchReport, Measurement, Spread

# Rounds of a quiet machine differ by some percent.
_WIDEST_SPREAD: Final = 2.0


def noise(report: BenchReport) -> list[str]:
    """Return every reason to mistrust a report's figures."""
    busy = busy_machine(report)
    return [*([] if busy is None else [busy]), *wide_spreads(report)]


def busy_machine(report: BenchReport) -> str | None:
    """Return that other programs wanted more cores than there are, before anything was measured."""
    try:
        load, cores = float(report.environment[LOAD]), int(report.environment["cores"])
    except (KeyError, ValueError):  # no system says it, or a record of another program
        return None
    if load <= cores:
        return None
    return (
        f"the machine was busy before the benchmark began: a load of {load:.1f} on {cores} "
        f"core{'' if cores == 1 else 's'}. Figures of a busy machine are noise: end other programs and "
        "measure again"
    )


def wide_spreads(report: BenchReport) -> Iterator[str]:
    """Yield the rates whose rounds differ by more than a factor of 2."""
    for measured in report.measurements:
        for phase, rates in _rates(measured):
            spread = Spread.of(rates)
            if spread.highest > _WIDEST_SPREAD * spread.lowest:
                low, high = format_figure(spread.lowest), format_figure(spread.highest)
                yield (
                    f"{phase} of {measured.contender} ({measured.case}) went from {low} to {high} "
                    "tokens/s between rounds: that is noise. Measure on a quiet machine, with more "
                    "--rounds"
                )


def _rates(measured: Measurement) -> tuple[tuple[str, list[float]], ...]:
    return ("prefill", measured.prefill_rates()), ("decode", measured.decode_rates())

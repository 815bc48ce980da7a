import dataclasses

import pytest

from gemma_deploy.cli.bench_noise import busy_machine, noise, wide_spreads
from gemma_deploy.runtime.benchmark.results import LOAD, BenchReport, RoundTimes


def _on(report: BenchReport, **environment: str) -> BenchReport:
    return dataclasses.replace(report, environment=environment)


@pytest.mark.parametrize(
    ("load", "cores", "is_busy"),
    [("0.10", "2", False), ("2.00", "2", False), ("2.01", "2", True), ("17.30", "1", True)],
)
def test_a_busy_machine(bench_report: BenchReport, load: str, cores: str, *, is_busy: bool) -> None:
    text = busy_machine(_on(bench_report, **{LOAD: load, "cores": cores}))

    assert (text is not None) == is_busy
    if text is not None:
        assert f"a load of {float(load):.1f} on {cores} core" in text


@pytest.mark.parametrize("environment", [{}, {LOAD: "many", "cores": "2"}, {LOAD: "9"}])
def test_where_nobody_tells(bench_report: BenchReport, environment: dict[str, str]) -> None:
    assert busy_machine(_on(bench_report, **environment)) is None


def test_rounds_that_differ(bench_report: BenchReport) -> None:
    assert list(wide_spreads(bench_report)) == []  # by a quarter

    first, *rest = bench_report.measurements
    slow = RoundTimes(ttft_s=first.rounds[0].ttft_s * 10, step_s=first.rounds[0].step_s)
    first = dataclasses.replace(first, rounds=(*first.rounds, slow))
    report = dataclasses.replace(bench_report, measurements=(first, *rest))

    (text,) = noise(report)
    assert text.startswith(
        "prefill of gemma-deploy (prompt 8, new 3, batch 2) went from 100 to 1,250 tokens/s"
    )

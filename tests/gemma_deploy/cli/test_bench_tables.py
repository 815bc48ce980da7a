import dataclasses

import pytest

from gemma_deploy.cli.bench_tables import print_report
from gemma_deploy.runtime.benchmark.results import BenchReport


def test_everything_is_on_stdout(
    bench_report: BenchReport, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(bench_report)

    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    for title in (
        "Environment",
        "Benchmark of models/bundle",
        "Load time, memory",
        "Rates: prompt 8, new 3, batch 2",
        "Latencies: prompt 256, new 3, batch 2",
        "Share of the machine: prompt 8, new 3, batch 2",
    ):
        assert title in lines
    assert "  CPU      Some CPU" in lines
    assert "  absent        skipped: needs 9 GiB" in lines
    assert not any(line != line.rstrip() for line in lines)


def test_figures_are_aligned_to_the_right(
    bench_report: BenchReport, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(bench_report)

    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Load time, memory")
    assert lines[start + 1 : start + 5] == [
        "                load, s  peak memory",
        "  gemma-deploy     1.50     3.00 GiB",
        "  slow             0.25     1.00 MiB",
        "  absent              -            -",
    ]


def test_a_report_without_a_round_says_so(
    bench_report: BenchReport, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(dataclasses.replace(bench_report, measurements=(), environment={}))

    assert capsys.readouterr().out.endswith(
        "No round was run to its end: there is nothing to compare.\n"
    )

import dataclasses

import pytest

from gemma_deploy.cli.bench_rows import (
    contender_facts,
    cost_rows,
    format_figure,
    format_spread,
    latency_rows,
    rate_rows,
    roofline_facts,
    share_facts,
)
from gemma_deploy.runtime.benchmark.results import BenchReport, Spread


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00"),
        (0.834, "0.83"),
        (9.996, "10.0"),
        (24.52, "24.5"),
        (99.94, "99.9"),
        (99.96, "100"),
        (1720.4, "1,720"),
        (-12.34, "-12.3"),
    ],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert format_figure(value) == text


def test_a_spread_is_shown_where_there_is_one() -> None:
    assert format_spread(Spread(median=2, lowest=1, highest=3), "x") == "2.00x (1.00 to 3.00)"
    assert format_spread(Spread(median=2, lowest=2, highest=2)) == "2.00"


def test_rates_and_how_many_times_ours_is_faster(bench_report: BenchReport) -> None:
    headings, ours, slow, absent = rate_rows(bench_report, bench_report.cases()[0])

    assert headings == ("", "prefill, tokens/s", "ours / its", "decode, tokens/s", "ours / its")
    assert ours == (
        "gemma-deploy",
        "1,125 (1,000 to 1,250)",
        "",
        "90.0 (80.0 to 100)",
        "",
    )
    # Ratios are taken within a round, so they have no spread where both drift together.
    assert slow == ("slow", "562 (500 to 625)", "2.00x", "45.0 (40.0 to 50.0)", "2.00x")
    assert absent == ("absent", "-", "-", "-", "-")


def test_no_ratios_without_baselines(bench_report: BenchReport) -> None:
    alone = dataclasses.replace(bench_report, contenders=bench_report.contenders[:1])

    assert rate_rows(alone, alone.cases()[0])[0] == ("", "prefill, tokens/s", "decode, tokens/s")


def test_latencies_are_in_milliseconds(bench_report: BenchReport) -> None:
    _, ours, _, absent = latency_rows(bench_report, bench_report.cases()[0])

    # 16 tokens at 1000 and at 1250 tokens/s; steps of 20 and of 25 ms.
    assert ours == ("gemma-deploy", "14.4 (12.8 to 16.0)", "22.5", "25.0", "25.0", "2")
    assert absent == ("absent", "-", "-", "-", "-", "-")


def test_contenders_say_what_they_were(bench_report: BenchReport) -> None:
    assert contender_facts(bench_report) == [
        ("gemma-deploy", "onnxruntime, cpu"),
        ("slow", "torch, cpu"),
        ("absent", "skipped: needs 9 GiB"),
    ]


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        (
            "crashed. It said last:\nTraceback:\n  x\nValueError: no",
            "crashed. It said last: ... ValueError: no",
        ),
        ("crashed. It said last:\n(it said nothing)", "crashed. It said last: (it said nothing)"),
    ],
)
def test_a_crash_is_shown_in_one_line(reason: str, shown: str, bench_report: BenchReport) -> None:
    absent = dataclasses.replace(bench_report.contenders[2], skipped=reason)
    report = dataclasses.replace(bench_report, contenders=(*bench_report.contenders[:2], absent))
    assert contender_facts(report)[2] == ("absent", f"skipped: {shown}")


def test_costs_leave_out_what_nobody_knows(bench_report: BenchReport) -> None:
    assert cost_rows(bench_report) == [
        ("", "load, s", "peak memory"),
        ("gemma-deploy", "1.50", "3.00 GiB"),
        ("slow", "0.25", "1.00 MiB"),
        ("absent", "-", "-"),
    ]


def test_shares_of_the_machine(bench_report: BenchReport) -> None:
    assert share_facts(bench_report, bench_report.cases()[0]) == [
        ("prefill", "25% of the matrix rate"),
        ("decode", "50% of the bandwidth, which allows 180 tokens/s"),
    ]


def test_no_shares_without_a_roofline_or_ours(bench_report: BenchReport) -> None:
    unknown = dataclasses.replace(bench_report, roofline=None)
    case = unknown.cases()[0]

    assert share_facts(unknown, case) == []
    assert roofline_facts(unknown) == []
    others = dataclasses.replace(bench_report, measurements=tuple(bench_report.measurements[1:2]))
    assert share_facts(others, case) == []


def test_limits_and_needs(bench_report: BenchReport) -> None:
    assert bench_report.roofline is not None
    sliding = dataclasses.replace(
        bench_report.roofline,
        read_bytes_per_s=34.1e9,
        cache_bytes_per_token=2_000,
        window_bytes_per_token=10_000,
        window_tokens=1024,
    )

    facts = dict(roofline_facts(dataclasses.replace(bench_report, roofline=sliding)))

    assert facts["memory bandwidth"] == "34.1 GB/s"
    assert facts["KV cache per token"] == "12.0 kB, 10.0 kB of them for the last 1,024 tokens only"
    assert dict(roofline_facts(bench_report))["KV cache per token"] == "0.01 kB"

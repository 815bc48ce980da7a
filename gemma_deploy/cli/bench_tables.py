"""What `bench` prints for people."""

from gemma_deploy.cli.bench_rows import (
    contender_facts,
    cost_rows,
    latency_rows,
    rate_rows,
    roofline_facts,
    share_facts,
)
from gemma_deploy.cli.console import emit_columns, emit_table, say
from gemma_deploy.runtime.benchmark.results import BenchReport


def print_report(report: BenchReport) -> None:
    """Write a report to stdout: the machine, who took part at which cost, and each case.

    Figures are medians over the rounds with the lowest and the highest; ratios are taken round by
    round.
    """
    if report.environment:
        emit_table(list(report.environment.items()), title="Environment")
    emit_table(contender_facts(report), title=f"Benchmark of {report.model}")
    costs = cost_rows(report)
    if len(costs[0]) > 1:
        emit_columns(costs, title="Load time, memory")
    limits = roofline_facts(report)
    if limits:
        emit_table(limits, title="The machine at its best, the model's needs")
    for case in report.cases():
        emit_columns(rate_rows(report, case), title=f"Rates: {case}")
        emit_columns(latency_rows(report, case), title=f"Latencies: {case}")
        shares = share_facts(report, case)
        if shares:
            emit_table(shares, title=f"Share of the machine: {case}")
    if not report.measurements:
        say("No round was run to its end: there is nothing to compare.")

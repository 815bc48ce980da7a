"""What a benchmark found, as rows of text that a terminal, a web page or Markdown can show."""

import statistics

from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.runtime.benchmark.results import (
    OURS,
    BenchCase,
    BenchReport,
    Contender,
    Measurement,
    Spread,
)

Rows = list[tuple[str, ...]]
"""A table: headings first, a name first in each row."""

_NOTHING = "-"
_PERCENTILES = (50, 90, 99)


def format_figure(value: float) -> str:
    """Return a figure for people with about three digits: `1,720`, `24.5`, `0.83`."""
    for limit, decimals in ((99.95, 0), (9.995, 1)):
        if abs(value) >= limit:
            return f"{value:,.{decimals}f}"
    return f"{value:.2f}"


def format_spread(spread: Spread, unit: str = "") -> str:
    """Return the median and, if the rounds differ, the lowest and the highest of them."""
    median = f"{format_figure(spread.median)}{unit}"
    low, high = format_figure(spread.lowest), format_figure(spread.highest)
    return median if low == high else f"{median} ({low} to {high})"


def headline_facts(report: BenchReport) -> list[tuple[str, str]]:
    """Return ours in the first case, in three figures with their names; nothing if it did not run."""
    cases = report.cases()
    ours = report.of(OURS, cases[0]) if cases else None
    if ours is None:
        return []
    return [
        ("decode, tokens/s", format_figure(statistics.median(ours.decode_rates()))),
        ("prefill, tokens/s", format_figure(statistics.median(ours.prefill_rates()))),
        ("first token, ms", format_figure(1e3 * ours.ttft_s().median)),
    ]


def contender_facts(report: BenchReport) -> list[tuple[str, str]]:
    """Return what each contender was, or why it did not run to its end."""
    return [(x.name, _what_ran(x)) for x in report.contenders]


def _what_ran(contender: Contender) -> str:
    skipped = f"skipped: {_in_one_line(contender.skipped)}" if contender.skipped is not None else ""
    return "; ".join(part for part in (contender.description, skipped) if part) or _NOTHING


def _in_one_line(reason: str) -> str:
    """Return a reason's first and last line: between them is what a crashed process printed before."""
    first, *rest = reason.splitlines() or [""]
    return f"{first} ... {rest[-1].strip()}" if len(rest) > 1 else " ".join([first, *rest])


def cost_rows(report: BenchReport) -> Rows:
    """Return the load time and the memory of each contender; no column that nobody has."""
    columns = [
        ("load, s", [None if x.load_s is None else f"{x.load_s:.2f}" for x in report.contenders]),
        ("peak memory", [_bytes(x.peak_memory_bytes) for x in report.contenders]),
        ("of it not files", [_bytes(x.peak_anonymous_bytes) for x in report.contenders]),
        ("peak GPU memory", [_bytes(x.peak_gpu_bytes) for x in report.contenders]),
    ]
    known = [(title, cells) for title, cells in columns if any(x is not None for x in cells)]
    rows: Rows = [("", *(title for title, _ in known))]
    for index, contender in enumerate(report.contenders):
        rows.append((contender.name, *(cells[index] or _NOTHING for _, cells in known)))
    return rows


def _bytes(size_bytes: int | None) -> str | None:
    return None if size_bytes is None else format_bytes(size_bytes)


def rate_rows(report: BenchReport, case: BenchCase) -> Rows:
    """Return each contender's rates in a case, and ours as a multiple of them."""
    headings: tuple[str, ...] = ("prefill, tokens/s", "decode, tokens/s")
    has_baselines = len(report.contenders) > 1
    if has_baselines:
        headings = (headings[0], "ours / its", headings[1], "ours / its")
    rows: Rows = [("", *headings)]
    for contender in report.contenders:
        found = report.of(contender.name, case)
        ratios = None if contender.name == OURS else report.ratios(contender.name, case)
        missing = "" if contender.name == OURS else _NOTHING
        cells: list[str] = []
        for index, rates in enumerate(_rates(found)):
            cells.append(_NOTHING if rates is None else format_spread(rates))
            if has_baselines:
                cells.append(missing if ratios is None else format_spread(ratios[index], "x"))
        rows.append((contender.name, *cells))
    return rows


def _rates(measurement: Measurement | None) -> tuple[Spread | None, Spread | None]:
    if measurement is None:
        return None, None
    return Spread.of(measurement.prefill_rates()), Spread.of(measurement.decode_rates())


def latency_rows(report: BenchReport, case: BenchCase) -> Rows:
    """Return how long each contender let wait in a case: for the first token, and for each after it."""
    steps = [f"step p{percent}, ms" for percent in _PERCENTILES]
    rows: Rows = [("", "first token, ms", *steps, "rounds")]
    for contender in report.contenders:
        found = report.of(contender.name, case)
        if found is None:
            rows.append((contender.name, *[_NOTHING] * (len(steps) + 2)))
            continue
        ttft = found.ttft_s()
        ttft_ms = Spread.of([1e3 * x for x in (ttft.lowest, ttft.median, ttft.highest)])
        percentiles = [format_figure(1e3 * found.step_percentile_s(x)) for x in _PERCENTILES]
        rows.append((contender.name, format_spread(ttft_ms), *percentiles, str(len(found.rounds))))
    return rows


def share_facts(report: BenchReport, case: BenchCase) -> list[tuple[str, str]]:
    """Return how near ours came to what the machine can do; nothing where that is not known."""
    ours = report.of(OURS, case)
    if report.roofline is None or ours is None:
        return []
    prefill, decode = report.roofline.prefill_share(ours), report.roofline.decode_share(ours)
    limit = statistics.median(ours.decode_rates()) / decode
    return [
        ("prefill", f"{prefill:.0%} of the matrix rate"),
        ("decode", f"{decode:.0%} of the bandwidth, which allows {format_figure(limit)} tokens/s"),
    ]


def roofline_facts(report: BenchReport) -> list[tuple[str, str]]:
    """Return what the machine can do at most and what the model asks of it; nothing if unknown."""
    roofline = report.roofline
    if roofline is None:
        return []
    window_bytes = roofline.window_bytes_per_token
    cache = _kilobytes(roofline.cache_bytes_per_token + window_bytes)
    if roofline.window_tokens:
        last = f"for the last {roofline.window_tokens:,} tokens only"
        cache = f"{cache}, {_kilobytes(window_bytes)} of them {last}"
    return [
        ("memory bandwidth", f"{format_figure(roofline.read_bytes_per_s / 1e9)} GB/s"),
        ("matrix rate", f"{format_figure(roofline.matrix_flop_per_s / 1e9)} GFLOP/s"),
        ("weights per step", f"{format_figure(roofline.weights_bytes_per_step / 1e6)} MB"),
        ("KV cache per token", cache),
        ("a prompt's token", f"{format_figure(roofline.flop_per_token / 1e9)} GFLOP"),
    ]


def _kilobytes(size_bytes: int) -> str:
    return f"{format_figure(size_bytes / 1e3)} kB"

"""The overflow preflight's report for people: a line for each layer."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gemma_deploy.cli.console import say

if TYPE_CHECKING:
    from gemma_deploy.overflow_report import OverflowReport, Peak, WeightLoss

# Tensors that a scale can be folded around have a column each; the others share the last one.
_COLUMNS = ("residual", "value", "attention", "product", "feed_forward")
_MOST_NAMES = 8


def emit_overflow(report: "OverflowReport", *, to_stderr: bool = False) -> None:
    """Write the report: peaks, what they are divided by, the headroom, and what would overflow.

    Args:
        report: The report.
        to_stderr: Whether stdout is for something else.
    """
    say("float16 overflow preflight", bold=True, err=to_stderr)
    for line in overflow_lines(report):
        say(f"  {line}".rstrip(), err=to_stderr)


def overflow_lines(report: "OverflowReport") -> Iterator[str]:
    """Yield the report's lines."""
    yield _origin(report)
    yield "each cell: peak, / what it is divided by; ! where float16 would have overflowed"
    yield from _table(report)
    outer = ", ".join(f"{x.tensor} {_cell(x)}" for x in report.of_layer(None))
    yield f"outside of layers: {outer}"
    yield _verdict(report)
    if report.out_of_reach:
        yield (
            f"warning: no scale can be folded around {_names(report.out_of_reach)}: it may overflow; "
            "bfloat16 and float32 cannot"
        )
    yield from _weight_lines(report.weight_losses)


def _origin(report: "OverflowReport") -> str:
    if report.source == "measured":
        return f"measured on {report.num_tokens} tokens, to be held {report.wanted_headroom:g} times over"
    return "bounded from the weights: no text can reach more, and hardly any comes near"


def _table(report: "OverflowReport") -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("layer", *_COLUMNS, "others", "headroom")]
    for index in range(len(report.scaling.layers)):
        peaks = {x.tensor: x for x in report.of_layer(index)}
        others = [x for x in peaks.values() if x.tensor not in _COLUMNS]
        largest = max(others, key=lambda x: x.peak / x.divisor)
        least = min(x.headroom for x in peaks.values())
        cells = (_cell(peaks[column]) for column in _COLUMNS)
        rows.append((str(index), *cells, f"{largest.tensor} {_cell(largest)}", f"{least:.1f}x"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _cell(peak: "Peak") -> str:
    divided = f" /{peak.divisor:.0f}" if peak.divisor != 1 else ""
    return f"{'!' if peak.overflows else ''}{peak.peak:.3g}{divided}"


def _verdict(report: "OverflowReport") -> str:
    if report.scaling.is_none:
        return "nothing needs to be divided" + (
            f": {_names(report.overflowing)} cannot be" if report.overflowing else ""
        )
    would = "would have" if report.source == "measured" else "could have"
    names = _names(report.overflowing) if report.overflowing else "nothing"
    return f"unscaled, {would} overflowed: {names}"


def _names(peaks: tuple["Peak", ...]) -> str:
    more = len(peaks) - _MOST_NAMES
    names = ", ".join(x.name for x in peaks[:_MOST_NAMES])
    return names if more <= 0 else f"{names} and {more} more"


def _weight_lines(losses: tuple["WeightLoss", ...]) -> Iterator[str]:
    """Yield a line for weights that lose most of each kind."""
    for kind, text in (
        ("num_too_large", "too large for float16"),
        ("num_subnormal", "subnormal in float16 (fewer than 11 bits)"),
        ("num_zeroed", "rounded to zero"),
    ):
        found = [x for x in losses if getattr(x, kind)]
        if found:
            count = sum(getattr(x, kind) for x in found)
            share = max(getattr(x, kind) / x.num_weights for x in found)
            worst = max(found, key=lambda x: getattr(x, kind) / x.num_weights)
            yield f"weights {text}: {count}; most in {worst.name} ({share:.2%} of it)"

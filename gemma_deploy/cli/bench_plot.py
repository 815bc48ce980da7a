"""A benchmark as an SVG drawing: bars for each case, lines over the length of prompts."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from gemma_deploy.cli.bench_rows import format_figure
from gemma_deploy.cli.svg import (
    CHARACTER_WIDTH,
    FAINT,
    GRID,
    INK,
    Axis,
    bar,
    document,
    dot,
    label,
    line,
    shortened,
    whisker,
)
from gemma_deploy.runtime.benchmark.results import BenchCase, BenchReport, Measurement, Spread

# Okabe and Ito's colours, which can be told apart without seeing red or green; ours is the first.
# https://jfly.uni-koeln.de/color/
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666")
_WIDTH: Final = 940
_MARGIN: Final = 20
_GAP: Final = 24
_MOST_NAME_CHARACTERS: Final = 24
_BAR_HEIGHT, _BAR_PITCH = 14, 24
_VALUE_WIDTH: Final = 56
_AXIS_HEIGHT: Final = 40
_LINES_HEIGHT: Final = 190
_TICK_WIDTH: Final = 52
_MIN_TICK_DISTANCE: Final = 44


@dataclass(frozen=True, slots=True)
class _Phase:
    """What a column of the drawing shows: rates in tokens/s, one per round."""

    name: str
    rates: Callable[[Measurement], list[float]]


_PHASES: Final = (
    _Phase("prefill", Measurement.prefill_rates),
    _Phase("decode", Measurement.decode_rates),
)


def report_svg(report: BenchReport) -> str:
    """Return a drawing of every case: rates of prefill and decode, medians with slowest and fastest.

    Where cases differ only in the length of prompts, their rates are also drawn over it.
    """
    pen = _Pen(report)
    elements = list(pen.heading())
    for case in report.cases():
        elements += pen.bars(case)
    for cases in _sweeps(report.cases()):
        elements += pen.curves(cases)
    if not report.measurements:
        elements += pen.note("No round was run to its end.")
    return document(_WIDTH, pen.y + _MARGIN, elements)


def _sweeps(cases: Sequence[BenchCase]) -> list[list[BenchCase]]:
    """Return the cases that differ only in the length of prompts, shortest first; no single ones."""
    found: dict[tuple[int, int], list[BenchCase]] = {}
    for case in sorted(cases):
        found.setdefault((case.new_tokens, case.batch_size), []).append(case)
    return [group for group in found.values() if len(group) > 1]


class _Pen:
    """Draws a report from the top down.

    Attributes:
        y: Where the next part begins, in pixels.
    """

    def __init__(self, report: BenchReport) -> None:
        self.report = report
        self.names = [contender.name for contender in report.contenders]
        self.y = float(_MARGIN)
        longest = max((min(len(name), _MOST_NAME_CHARACTERS) for name in self.names), default=0)
        self.left = _MARGIN + longest * CHARACTER_WIDTH + 10
        self.panel_width = (_WIDTH - _MARGIN - self.left - _GAP) / 2

    def heading(self) -> Iterator[str]:
        """Yield what was measured, on what, and what the marks mean."""
        environment = self.report.environment
        threads = f"{environment['threads']} threads" if "threads" in environment else ""
        facts = [environment.get(name, "") for name in ("CPU", "GPU")]
        machine = ", ".join(x for x in (*facts, threads, environment.get("date", "")) if x)
        yield label(_MARGIN, self.y + 14, shortened(self.report.model, 90), size=16, is_bold=True)
        yield from self._line_of_text(34, machine)
        yield from self._line_of_text(
            52,
            "Median over the rounds; whiskers from the slowest to the fastest. Longer is better.",
        )
        self.y += 66

    def _line_of_text(self, offset: float, text: str) -> Iterator[str]:
        yield label(_MARGIN, self.y + offset, shortened(text, 125), colour=FAINT)

    def note(self, text: str) -> Iterator[str]:
        """Yield a line of text."""
        yield label(_MARGIN, self.y + 14, text)
        self.y += 24

    def bars(self, case: BenchCase) -> Iterator[str]:
        """Yield a case: a bar for each contender and phase."""
        yield label(_MARGIN, self.y + 14, str(case), size=14, is_bold=True)
        top = self.y + 26
        for number, name in enumerate(self.names):
            baseline = top + number * _BAR_PITCH + _BAR_HEIGHT - 2
            short = shortened(name, _MOST_NAME_CHARACTERS)
            yield label(self.left - 8, baseline, short, anchor="end")
        for column, phase in enumerate(_PHASES):
            left = self.left + column * (self.panel_width + _GAP)
            yield from self._bar_panel(case, phase, left, top)
        self.y = top + len(self.names) * _BAR_PITCH + _AXIS_HEIGHT + 10

    def _bar_panel(self, case: BenchCase, phase: _Phase, left: float, top: float) -> Iterator[str]:
        spreads = [_spread(self.report.of(name, case), phase) for name in self.names]
        axis = Axis.up_to(
            max((x.highest for x in spreads if x is not None), default=0.0),
            start=left,
            end=left + self.panel_width - _VALUE_WIDTH,
        )
        bottom = top + len(self.names) * _BAR_PITCH
        for x, text in axis.ticks():
            yield line((x, top - 4), (x, bottom), GRID)
            yield label(x, bottom + 14, text, anchor="middle", colour=FAINT, size=11)
        for number, spread in enumerate(spreads):
            yield from _bar(spread, axis, top + number * _BAR_PITCH, _colour(number))
        yield line((left, top - 4), (left, bottom), INK)
        yield label(
            (axis.start + axis.end) / 2, bottom + 31, f"{phase.name}, tokens/s", anchor="middle"
        )

    def curves(self, cases: Sequence[BenchCase]) -> Iterator[str]:
        """Yield how rates change with the length of prompts."""
        title = (
            f"over the length of prompts: new {cases[0].new_tokens}, batch {cases[0].batch_size}"
        )
        yield label(_MARGIN, self.y + 14, title, size=14, is_bold=True)
        yield from self._legend(self.y + 34)
        top = self.y + 70
        for column, phase in enumerate(_PHASES):
            yield from self._curve_panel(cases, phase, column, top)
        self.y = top + _LINES_HEIGHT + _AXIS_HEIGHT + 10

    def _legend(self, baseline: float) -> Iterator[str]:
        x = float(_MARGIN)
        for number, name in enumerate(self.names):
            short = shortened(name, _MOST_NAME_CHARACTERS)
            yield line((x, baseline - 4), (x + 18, baseline - 4), _colour(number), 2)
            yield dot(x + 9, baseline - 4, 3.5, _colour(number))
            yield label(x + 24, baseline, short)
            x += 24 + len(short) * CHARACTER_WIDTH + 20

    def _curve_panel(
        self, cases: Sequence[BenchCase], phase: _Phase, column: int, top: float
    ) -> Iterator[str]:
        width = (_WIDTH - 2 * _MARGIN - _GAP) / 2
        left = _MARGIN + column * (width + _GAP) + _TICK_WIDTH
        right, bottom = left + width - _TICK_WIDTH, top + _LINES_HEIGHT
        by_name = {name: self._points(cases, phase, name) for name in self.names}
        highest = max((x.highest for points in by_name.values() for _, x in points), default=0.0)
        rates = Axis.up_to(highest, start=bottom, end=top)
        lengths = _LengthAxis(cases, left + 10, right - 10)
        for y, text in rates.ticks():
            yield line((left, y), (right, y), GRID)
            yield label(left - 6, y + 4, text, anchor="end", colour=FAINT, size=11)
        yield line((left, bottom), (right, bottom), INK)
        for x, text in lengths.ticks():
            yield line((x, bottom), (x, bottom + 4), INK)
            yield label(x, bottom + 16, text, anchor="middle", colour=FAINT, size=11)
        for number, points in enumerate(by_name.values()):
            yield from _curve(points, lengths, rates, _colour(number))
        yield label(left, top - 8, f"{phase.name}, tokens/s")
        yield label((left + right) / 2, bottom + 33, "tokens of each prompt", anchor="middle")

    def _points(
        self, cases: Sequence[BenchCase], phase: _Phase, name: str
    ) -> list[tuple[int, Spread]]:
        spreads = [(x.prompt_tokens, _spread(self.report.of(name, x), phase)) for x in cases]
        return [(tokens, spread) for tokens, spread in spreads if spread is not None]


class _LengthAxis:
    """Lengths of prompts on a logarithmic axis: sweeps double them."""

    def __init__(self, cases: Sequence[BenchCase], start: float, end: float) -> None:
        self.lengths = [case.prompt_tokens for case in cases]
        self.start = start
        self.pixels = (end - start) / math.log(self.lengths[-1] / self.lengths[0])

    def position(self, tokens: int) -> float:
        return self.start + math.log(tokens / self.lengths[0]) * self.pixels

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Yield the lengths that were measured, without those too near to the one before."""
        last = -math.inf
        for tokens in self.lengths:
            x = self.position(tokens)
            if x - last >= _MIN_TICK_DISTANCE:
                yield x, f"{tokens:,}"
                last = x


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _spread(measurement: Measurement | None, phase: _Phase) -> Spread | None:
    return None if measurement is None else Spread.of(phase.rates(measurement))


def _bar(spread: Spread | None, axis: Axis, top: float, colour: str) -> Iterator[str]:
    middle = top + _BAR_HEIGHT / 2
    if spread is None:
        yield label(axis.start + 8, middle + 4, "not measured", colour=FAINT)
        return
    yield bar(axis.start, top, axis.position(spread.median) - axis.start, _BAR_HEIGHT, colour)
    low, high = axis.position(spread.lowest), axis.position(spread.highest)
    yield from whisker((low, middle), (high, middle), INK)
    yield label(high + 8, middle + 4, format_figure(spread.median))


def _curve(
    points: Sequence[tuple[int, Spread]], lengths: _LengthAxis, rates: Axis, colour: str
) -> Iterator[str]:
    places = [(lengths.position(tokens), rates.position(x.median)) for tokens, x in points]
    for start, end in pairwise(places):
        yield line(start, end, colour, 2)
    for (x, y), (_, spread) in zip(places, points, strict=True):
        low, high = rates.position(spread.lowest), rates.position(spread.highest)
        yield from whisker((x, low), (x, high), colour)
        yield dot(x, y, 3.5, colour)

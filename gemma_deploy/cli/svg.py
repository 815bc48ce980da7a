"""Elements of an SVG drawing on a light ground, as text.

https://www.w3.org/TR/SVG11/
"""

import html
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

INK: Final = "#222222"
FAINT: Final = "#5f6368"
GRID: Final = "#dddddd"
FONT_SIZE: Final = 12
_FONTS: Final = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
CHARACTER_WIDTH: Final = 7.0
"""A generous width of a character, in pixels: what is drawn cannot be measured here."""

# https://www.w3.org/TR/xml/#charsets
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escaped(text: str) -> str:
    """Return text as XML and HTML hold it, in elements and attributes; no character breaks it."""
    return html.escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text))


def document(width: float, height: float, elements: Iterable[str]) -> str:
    """Return a drawing of a size in pixels, on white; it can stand alone or within HTML."""
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="{_FONTS}" font-size="{FONT_SIZE}" '
        f'fill="{INK}">'
    )
    lines = [
        start,
        '<rect width="100%" height="100%" fill="white"/>',
        *elements,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def label(
    x: float,
    y: float,
    text: str,
    *,
    anchor: Literal["start", "middle", "end"] = "start",
    colour: str = INK,
    size: int = FONT_SIZE,
    is_bold: bool = False,
) -> str:
    """Return text whose baseline is at `y`, escaped."""
    weight = ' font-weight="bold"' if is_bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-size="{size}"{weight}>{escaped(text)}</text>'
    )


def line(
    start: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1
) -> str:
    """Return a straight line."""
    (x1, y1), (x2, y2) = start, end
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{colour}" stroke-width="{width:g}"/>'
    )


def bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    """Return a filled rectangle with its upper left corner at (x, y)."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'
    )


def dot(x: float, y: float, radius: float, colour: str) -> str:
    """Return a filled circle."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>'


def whisker(
    start: tuple[float, float], end: tuple[float, float], colour: str, cap: float = 4
) -> list[str]:
    """Return a horizontal or vertical line with a cap across each end."""
    (x1, y1), (x2, y2) = start, end
    dx, dy = (0.0, cap) if y1 == y2 else (cap, 0.0)
    return [
        line(start, end, colour, 1.5),
        *(line((x - dx, y - dy), (x + dx, y + dy), colour, 1.5) for x, y in ((x1, y1), (x2, y2))),
    ]


def shortened(text: str, most: int) -> str:
    """Return at most so many characters of a text, the end of it being the more telling one."""
    return text if len(text) <= most else "…" + text[1 - most :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A linear axis from zero to a round number.

    Attributes:
        start: Where zero is, in pixels.
        end: Where `top` is; before `start` on an axis that points up.
        step: Distance of two ticks, in the axis' own unit.
        num_steps: How many of them reach the end.
    """

    start: float
    end: float
    step: float
    num_steps: int

    @classmethod
    def up_to(cls, largest: float, *, start: float, end: float, most_steps: int = 5) -> "Axis":
        """Return the shortest axis with round ticks (1, 2 or 5 times a power of ten) to hold a value."""
        if largest <= 0:
            return cls(start=start, end=end, step=1.0, num_steps=1)
        # The tolerance keeps an axis that ends exactly at its largest value from growing.
        least = largest / most_steps * (1 - 1e-9)
        power = 10.0 ** math.floor(math.log10(least))
        step = next(x * power for x in (1, 2, 5, 10) if x * power >= least)
        return cls(start=start, end=end, step=step, num_steps=math.ceil(largest / step - 1e-9))

    @property
    def top(self) -> float:
        """The value at the end."""
        return self.step * self.num_steps

    def position(self, value: float) -> float:
        """Return where a value is, in pixels."""
        return self.start + (self.end - self.start) * value / self.top

    def ticks(self) -> list[tuple[float, str]]:
        """Return where the ticks are, in pixels, and what is written there."""
        decimals = max(0, -math.floor(math.log10(self.step)))
        values = [number * self.step for number in range(self.num_steps + 1)]
        return [(self.position(value), f"{value:,.{decimals}f}") for value in values]

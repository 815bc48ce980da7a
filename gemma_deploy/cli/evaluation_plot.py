"""What `evaluate` found along a text, as CSV or as an SVG drawing."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from gemma_deploy.cli.bench_rows import format_figure
from gemma_deploy.cli.svg import FAINT, GRID, INK, Axis, bar, document, label, line, shortened

Figures = npt.NDArray[np.float64]

# A column of the drawing is the mean of one or more neighbouring tokens.
_COLUMNS: Final = 200
_WIDTH: Final = 940
_MARGIN: Final = 20
_TICK_WIDTH: Final = 52
_PANEL_HEIGHT: Final = 170
_AXIS_HEIGHT: Final = 44
_COLOUR, _MEAN_COLOUR = "#0072b2", "#d55e00"


def position_csv(token_ids: npt.NDArray[np.int64], nll: Figures, kl: Figures | None) -> str:
    """Return a line for each token [P]: its place in the text from 0, its id, and its figures."""
    lines = ["position,token_id,nll_nats,kl_nats"]
    for position, (token_id, surprise) in enumerate(zip(token_ids, nll, strict=True)):
        divergence = "" if kl is None else f"{kl[position]:.6g}"
        lines.append(f"{position},{token_id},{surprise:.6g},{divergence}")
    return "\n".join(lines) + "\n"


def position_svg(nll: Figures, kl: Figures | None, *, title: str, facts: Sequence[str]) -> str:
    """Return a drawing of the means along the text.

    Args:
        nll: Negative log-likelihood of each token [P], in nats.
        kl: Divergence from the reference at each token [P], in nats; None without a reference.
        title: What was evaluated.
        facts: Lines below the title: the text, the windows, the date.
    """
    panels = [("negative log-likelihood, nats per token", nll)]
    if kl is not None:
        panels.append(("KL(reference || model), nats per token", kl))
    elements = [label(_MARGIN, _MARGIN + 14, shortened(title, 90), size=16, is_bold=True)]
    y = _MARGIN + 34.0
    for fact in facts:
        elements.append(label(_MARGIN, y, shortened(fact, 125), colour=FAINT))
        y += 18
    for name, figures in panels:
        elements += _panel(name, figures, top=y + 28)
        y += 28 + _PANEL_HEIGHT + _AXIS_HEIGHT
    return document(_WIDTH, y + _MARGIN, elements)


def _panel(name: str, figures: Figures, *, top: float) -> Iterator[str]:
    columns = np.array(
        [part.mean() for part in np.array_split(figures, min(_COLUMNS, len(figures)))]
    )
    mean, bottom = float(figures.mean()), top + _PANEL_HEIGHT
    left, right = _MARGIN + _TICK_WIDTH, _WIDTH - _MARGIN
    nats = Axis.up_to(float(columns.max()), start=bottom, end=top)
    said = f"{name}: mean {_nats(mean)} (the line), highest column {_nats(float(columns.max()))}"
    yield label(_MARGIN, top - 10, said, size=14, is_bold=True)
    for number in range(nats.num_steps + 1):
        value = number * nats.step
        y = nats.position(value)
        yield line((left, y), (right, y), GRID)
        yield label(left - 6, y + 4, _nats(value), anchor="end", colour=FAINT, size=11)
    width = (right - left) / len(columns)
    for index, column in enumerate(columns):
        y = nats.position(float(column))
        yield bar(left + index * width, y, width, bottom - y, _COLOUR)
    yield line((left, nats.position(mean)), (right, nats.position(mean)), _MEAN_COLOUR, 1.5)
    yield line((left, bottom), (right, bottom), INK)
    yield line((left, top), (left, bottom), INK)
    yield from _token_axis(len(figures), len(columns), left, right, bottom)


def _token_axis(
    num_tokens: int, num_columns: int, left: float, right: float, bottom: float
) -> Iterator[str]:
    round_axis = Axis.up_to(num_tokens, start=0, end=1)
    step = max(1, round(round_axis.step))
    for token in range(0, num_tokens + 1, step):
        x = left + (right - left) * token / num_tokens
        yield line((x, bottom), (x, bottom + 4), INK)
        yield label(x, bottom + 16, f"{token:,}", anchor="middle", colour=FAINT, size=11)
    share = num_tokens / num_columns
    each = "a token" if share == 1 else f"the mean of about {format_figure(share)} tokens"
    text = f"tokens of the text; each column is {each}"
    yield label((left + right) / 2, bottom + 33, text, anchor="middle")


def _nats(value: float) -> str:
    """Return a figure in three digits: divergences may be as small as `2e-12`."""
    return f"{value:.3g}"

"""What `evaluate` found along a text, as CSV or as an SVG drawing."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from gemma_deploy.cli.svg import bar, document, label

Figures = npt.NDArray[np.float64]

# A column of the drawing is the mean of one or more neighbouring tokens.
_COLUMNS: Final = 200
_COLUMN_WIDTH, _HEIGHT, _TOP, _LEFT = 4, 150, 24, 8
_COLOUR: Final = "#4878a8"


def position_csv(token_ids: npt.NDArray[np.int64], nll: Figures, kl: Figures | None) -> str:
    """Return a line for each token [P]: its place in the text from 0, its id, and its figures."""
    lines = ["position,token_id,nll_nats,kl_nats"]
    for position, (token_id, surprise) in enumerate(zip(token_ids, nll, strict=True)):
        divergence = "" if kl is None else f"{kl[position]:.6g}"
        lines.append(f"{position},{token_id},{surprise:.6g},{divergence}")
    return "\n".join(lines) + "\n"


def position_svg(nll: Figures, kl: Figures | None) -> str:
    """Return a drawing of the means along the text: of the nll [P], and of the KL if there is one."""
    panels = [("negative log-likelihood, nats per token", nll)]
    if kl is not None:
        panels.append(("KL(reference || model), nats", kl))
    width = 2 * _LEFT + _COLUMNS * _COLUMN_WIDTH
    height = len(panels) * (_HEIGHT + _TOP) + _TOP
    elements: list[str] = []
    for number, (title, figures) in enumerate(panels):
        elements += _panel(title, figures, bottom=(number + 1) * (_HEIGHT + _TOP))
    elements.append(label(_LEFT, height - 8, f"tokens 0 to {len(nll) - 1} of the text"))
    return document(width, height, elements)


def _panel(title: str, figures: Figures, *, bottom: int) -> Iterator[str]:
    columns = np.array(
        [part.mean() for part in np.array_split(figures, min(_COLUMNS, len(figures)))]
    )
    largest = float(columns.max())
    column_width = _COLUMNS * _COLUMN_WIDTH / len(columns)
    title = f"{title}: mean {figures.mean():.4g}, highest column {largest:.4g}"
    yield label(_LEFT, bottom - _HEIGHT - 6, title)
    for index, column in enumerate(columns / (largest or 1) * _HEIGHT):
        yield bar(_LEFT + index * column_width, bottom - column, column_width, column, _COLOUR)

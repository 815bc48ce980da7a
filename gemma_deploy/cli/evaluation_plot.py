"""What `evaluate` found along a text, as CSV or as an SVG drawing."""

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

Figures = npt.NDArray[np.float64]

# A column of the drawing is the mean of one or more neighbouring tokens.
_COLUMNS: Final = 200
_COLUMN_WIDTH, _HEIGHT, _TOP, _LEFT = 4, 150, 24, 8


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
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">',
        "<style>text { font: 12px sans-serif }</style>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (title, figures) in enumerate(panels):
        lines += _panel(title, figures, bottom=(number + 1) * (_HEIGHT + _TOP))
    lines += [
        f'<text x="{_LEFT}" y="{height - 8}">tokens 0 to {len(nll) - 1} of the text</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _panel(title: str, figures: Figures, *, bottom: int) -> Iterator[str]:
    columns = np.array(
        [part.mean() for part in np.array_split(figures, min(_COLUMNS, len(figures)))]
    )
    largest = float(columns.max())
    column_width = _COLUMNS * _COLUMN_WIDTH / len(columns)
    yield (
        f'<text x="{_LEFT}" y="{bottom - _HEIGHT - 6}">{title}: mean {figures.mean():.4g}, highest '
        f"column {largest:.4g}</text>"
    )
    for index, column in enumerate(columns / (largest or 1) * _HEIGHT):
        yield (
            f'<rect x="{_LEFT + index * column_width:.1f}" y="{bottom - column:.1f}" '
            f'width="{column_width:.1f}" height="{column:.1f}" fill="#4878a8"/>'
        )

"""A benchmark as one HTML page that needs nothing beside it: no script, no font, no other file."""

from collections.abc import Iterator, Sequence
from typing import Final

from gemma_deploy.cli.bench_noise import noise
from gemma_deploy.cli.bench_plot import report_svg
from gemma_deploy.cli.bench_rows import (
    Rows,
    contender_facts,
    cost_rows,
    headline_facts,
    latency_rows,
    rate_rows,
    roofline_facts,
    share_facts,
)
from gemma_deploy.cli.svg import escaped
from gemma_deploy.runtime.benchmark.results import BenchReport

_STYLE: Final = """
:root { color-scheme: light }
body { font: 15px/1.5 sans-serif; color: #222; background: white; max-width: 960px;
  margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin-top: 2em } h3 { font-size: 1em }
h1, td { overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 0.8em 0; font-variant-numeric: tabular-nums }
th, td { padding: 0.25em 0.9em; border-bottom: 1px solid #ddd; text-align: right }
.figures { overflow-x: auto } .figures td, thead th { white-space: nowrap }
h2 { break-after: avoid } table { break-inside: avoid } @media print { body { font-size: 11px } }
th { font-weight: 600; background: #f5f6f7 } tbody th { background: none }
th:first-child, table.facts td { text-align: left }
.headline { display: flex; gap: 3em; margin: 1.2em 0 0 } .headline b { font-size: 1.9em }
.noise { background: #fff4ce; padding: 0.5em 0.9em }
svg { max-width: 100%; height: auto }
""".strip()
_METHOD: Final = (
    "Contenders take turns round by round, each in a process of its own. Rates are of all rows "
    "together: prefill is the tokens of the prompts over the time to the first token, decode the "
    "tokens after the first over the time of their steps. Figures are medians over the rounds, with "
    "the lowest and the highest in parentheses; ratios (ours / its) are taken within a round. "
    "Percentiles are over the steps of all rounds."
)


def report_html(report: BenchReport) -> str:
    """Return the page: drawings, tables of every case, who took part, the machine."""
    title = escaped(f"Benchmark of {report.model}")
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        f'<head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>',
        "<body>",
        f"<h1>{title}</h1>",
        *_headline(report),
        *(f'<p class="noise">Warning: {escaped(text)}.</p>' for text in noise(report)),
        f"<p>{escaped(_METHOD)}</p>",
        report_svg(report),
        *_contenders(report),
        *_cases(report),
        *_limits(report),
        "<h2>Environment</h2>",
        *_facts(list(report.environment.items())),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def _headline(report: BenchReport) -> Iterator[str]:
    """Yield the three figures that most readers come for: ours, of the first case."""
    figures = headline_facts(report)
    if not figures:
        return
    case = escaped(str(report.cases()[0]))
    yield '<div class="headline">'
    for name, figure in figures:
        yield f"<div><b>{escaped(figure)}</b> <div>{escaped(name)}</div></div>"
    yield f"</div><p>{case}</p>"


def _contenders(report: BenchReport) -> Iterator[str]:
    yield "<h2>Contenders</h2>"
    yield from _facts(contender_facts(report))
    costs = cost_rows(report)
    if len(costs[0]) > 1:
        yield from _table(costs)


def _cases(report: BenchReport) -> Iterator[str]:
    for case in report.cases():
        yield f"<h2>{escaped(str(case))}</h2>"
        yield from _table(rate_rows(report, case))
        yield from _table(latency_rows(report, case))
        yield from _facts(share_facts(report, case))


def _limits(report: BenchReport) -> Iterator[str]:
    limits = roofline_facts(report)
    if limits:
        yield "<h2>The machine at its best, the model's needs</h2>"
        yield from _facts(limits)


def _table(rows: Rows) -> Iterator[str]:
    headings, *body = rows
    cells = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in headings)
    yield f'<div class="figures"><table><thead><tr>{cells}</tr></thead><tbody>'
    for name, *figures in body:
        cells = "".join(f"<td>{escaped(figure)}</td>" for figure in figures)
        yield f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _facts(facts: Sequence[tuple[str, str]]) -> Iterator[str]:
    if not facts:
        return
    yield '<table class="facts"><tbody>'
    for name, value in facts:
        yield f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>'
    yield "</tbody></table>"

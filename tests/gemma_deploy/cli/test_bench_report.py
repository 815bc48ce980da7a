import dataclasses
import re
from html.parser import HTMLParser

from gemma_deploy.cli.bench_plot import report_svg
from gemma_deploy.cli.bench_report import report_html
from gemma_deploy.runtime.benchmark.results import OURS, BenchReport, Contender


class _Page(HTMLParser):
    """Reads a page and checks that every element that is opened is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in {"td", "th"}:
            self.cells.append(data)


def test_it_shows_the_drawing_the_tables_and_the_machine(bench_report: BenchReport) -> None:
    text = report_html(bench_report)

    page = _Page(text)
    assert report_svg(bench_report) in text
    for cell in (
        "1,125 (1,000 to 1,250)",
        "2.00x",
        "skipped: needs 9 GiB",
        "3.00 GiB",
        "50% of the bandwidth, which allows 180 tokens/s",
        "Some CPU",
    ):
        assert cell in page.cells


def test_it_needs_nothing_from_elsewhere(bench_report: BenchReport) -> None:
    text = report_html(bench_report)

    page = _Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.seen)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in page.attributes}
    assert not re.search(r"url\(|@import", text)


def test_text_is_escaped(bench_report: BenchReport) -> None:
    nasty = "<script>alert('&\x00')</script>"
    report = dataclasses.replace(
        bench_report,
        model=nasty,
        contenders=(
            Contender(name=OURS, description=nasty),
            Contender(name=nasty, skipped=nasty),
        ),
        environment={nasty: nasty},
    )

    text = report_html(report)

    assert "script" not in _Page(text).seen
    assert "\x00" not in text


def test_nothing_measured(bench_report: BenchReport) -> None:
    report = dataclasses.replace(bench_report, measurements=(), roofline=None, environment={})

    assert "No round was run to its end." in report_html(report)


def test_it_begins_with_three_figures(bench_report: BenchReport) -> None:
    text = report_html(bench_report)

    # The medians of ours in the first case.
    headline = re.findall(r"<b>([^<]*)</b> <div>([^<]*)</div>", text)
    assert headline == [
        ("90.0", "decode, tokens/s"),
        ("1,125", "prefill, tokens/s"),
        ("14.4", "first token, ms"),
    ]
    assert text.index("<b>") < text.index("<svg")
    assert "<b>" not in report_html(dataclasses.replace(bench_report, measurements=()))
    # Where ours did not run the first case, another case's figures are not shown as that one's.
    first = bench_report.cases()[0]
    rest = tuple(m for m in bench_report.measurements if (m.contender, m.case) != (OURS, first))
    baselines = dataclasses.replace(bench_report, measurements=rest)
    assert first in baselines.cases()
    assert "<b>" not in report_html(baselines)

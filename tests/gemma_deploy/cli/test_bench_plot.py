import dataclasses
import xml.etree.ElementTree as ET

import pytest

from gemma_deploy.cli.bench_plot import report_svg
from gemma_deploy.runtime.benchmark.results import OURS, BenchReport, Contender

SVG = "{http://www.w3.org/2000/svg}"


def _drawing(report: BenchReport) -> ET.Element:
    return ET.fromstring(report_svg(report).encode())


def _texts(drawing: ET.Element) -> list[str]:
    return [x.text or "" for x in drawing.iter(f"{SVG}text")]


def _bars(drawing: ET.Element) -> list[ET.Element]:
    """All rectangles but the ground."""
    return drawing.findall(f"{SVG}rect")[1:]


def test_bars_are_as_long_as_the_medians(bench_report: BenchReport) -> None:
    bars = _bars(_drawing(bench_report))

    assert len(bars) == 2 * 2 * 2  # cases, phases, contenders that ran
    for ours, slow in zip(bars[::2], bars[1::2], strict=True):
        assert float(ours.attrib["width"]) == pytest.approx(
            2 * float(slow.attrib["width"]), abs=0.2
        )
        assert ours.attrib["fill"] != slow.attrib["fill"]


def test_figures_and_axes_are_labelled(bench_report: BenchReport) -> None:
    texts = _texts(_drawing(bench_report))

    assert {"1,125", "562", "90.0", "45.0"} <= set(texts)
    assert texts.count("prefill, tokens/s") == texts.count("decode, tokens/s") == 3
    assert "prompt 8, new 3, batch 2" in texts
    assert texts.count("not measured") == 4
    assert "Some CPU, 2 threads, 2026-11-23 04:00 UTC" in texts


def test_everything_is_within_the_drawing(bench_report: BenchReport) -> None:
    drawing = _drawing(bench_report)
    width, height = float(drawing.attrib["width"]), float(drawing.attrib["height"])

    for element in drawing.iter():
        for name, limit in (("x", width), ("x2", width), ("y", height), ("y2", height)):
            assert 0 <= float(element.attrib.get(name, 0)) <= limit


def test_lines_are_drawn_over_a_sweep_of_prompts(bench_report: BenchReport) -> None:
    drawing = _drawing(bench_report)

    assert _texts(drawing).count("tokens of each prompt") == 2
    points = [x for x in drawing.iter(f"{SVG}circle") if x.attrib["r"] == "3.5"]
    assert len(points) == 3 + 2 * 2 * 2  # the legend; phases, contenders, lengths
    assert {"8", "256"} <= set(_texts(drawing))


def test_no_lines_where_prompts_are_of_one_length(bench_report: BenchReport) -> None:
    one = tuple(m for m in bench_report.measurements if m.case.prompt_tokens == 8)

    drawing = _drawing(dataclasses.replace(bench_report, measurements=one))

    assert not list(drawing.iter(f"{SVG}circle"))


def test_whiskers_reach_from_the_slowest_to_the_fastest_round(bench_report: BenchReport) -> None:
    drawing = _drawing(bench_report)
    bar = _bars(drawing)[0]
    left, width = float(bar.attrib["x"]), float(bar.attrib["width"])

    whiskers = [x for x in drawing.iter(f"{SVG}line") if x.attrib["stroke-width"] == "1.5"]

    # The first is ours at prefill: median 1125, from 1000 to 1250 tokens/s.
    assert float(whiskers[0].attrib["x1"]) == pytest.approx(left + width * 1000 / 1125, abs=0.2)
    assert float(whiskers[0].attrib["x2"]) == pytest.approx(left + width * 1250 / 1125, abs=0.2)


def test_names_cannot_break_it(bench_report: BenchReport) -> None:
    nasty = '</svg><script>"\x00' + "x" * 200
    found = _drawing(
        dataclasses.replace(
            bench_report,
            model=nasty,
            contenders=(Contender(name=OURS), Contender(name=nasty)),
            environment={"CPU": nasty},
        )
    )

    assert not list(found.iter(f"{SVG}script"))
    assert max(map(len, _texts(found))) <= 125


def test_nothing_measured(bench_report: BenchReport) -> None:
    empty = dataclasses.replace(bench_report, measurements=(), contenders=())

    assert "No round was run to its end." in _texts(_drawing(empty))

"""The drawing: its axes and what stands beside them, read back from the XML."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from gemma_deploy.cli.evaluation_plot import position_svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn(nll: np.ndarray, kl: np.ndarray | None = None) -> ET.Element:
    return ET.fromstring(position_svg(nll, kl, title="a <model>", facts=["a text", "a date"]))


def texts(drawing: ET.Element) -> list[str]:
    return ["".join(x.itertext()) for x in drawing.iter(f"{SVG}text")]


def test_it_says_what_is_shown() -> None:
    found = texts(drawn(np.linspace(0, 4, 1000)))

    assert found[:3] == ["a <model>", "a text", "a date"]
    assert (
        "negative log-likelihood, nats per token: mean 2 (the line), highest column 3.99" in found
    )
    assert "tokens of the text; each column is the mean of about 5.00 tokens" in found
    assert {"0", "1", "2", "3", "4"} <= set(found)  # nats
    assert {"200", "400", "600", "800", "1,000"} <= set(found)  # tokens


def test_both_panels_have_axes() -> None:
    one, two = (drawn(np.ones(20), kl) for kl in (None, np.full(20, 0.003)))

    assert sum("KL(reference || model)" in text for text in texts(two)) == 1
    assert len(list(two.iter(f"{SVG}line"))) > len(list(one.iter(f"{SVG}line"))) + 4
    assert float(two.attrib["height"]) > float(one.attrib["height"])
    assert "0.003" in texts(two)
    assert "tokens of the text; each column is a token" in texts(one)


@pytest.mark.parametrize("size", [16, 200, 201, 123_456])
def test_columns_fill_the_panel(size: int) -> None:
    drawing = drawn(np.arange(size, dtype=np.float64))
    _, *bars = drawing.findall(f"{SVG}rect")
    left = float(bars[0].attrib["x"])
    right = float(bars[-1].attrib["x"]) + float(bars[-1].attrib["width"])

    assert len(bars) == min(200, size)
    assert (left, right) == pytest.approx((72, 920), abs=0.2)
    heights = [float(x.attrib["height"]) for x in bars]
    assert heights == sorted(heights)


def test_small_divergences_have_short_labels() -> None:
    found = texts(drawn(np.ones(20), np.full(20, 1.5e-12)))

    assert {"5e-13", "1e-12", "1.5e-12"} <= set(found)


def test_figures_that_are_all_zero() -> None:
    drawing = drawn(np.ones(20), np.zeros(20))

    assert "nan" not in ET.tostring(drawing, encoding="unicode").lower()

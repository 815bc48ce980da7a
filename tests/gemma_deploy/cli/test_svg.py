import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_deploy.cli.svg import Axis, document, escaped, label, shortened, whisker

SVG = "{http://www.w3.org/2000/svg}"


@given(st.text())
def test_any_text_is_valid_and_kept(text: str) -> None:
    drawing = ET.fromstring(document(10, 10, [label(0, 0, text)]).encode())

    element = drawing.find(f"{SVG}text")
    assert element is not None
    # XML readers turn carriage returns into line feeds.
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    found = element.text or ""
    assert len(found) == len(expected)
    assert all(a in (b, "\N{REPLACEMENT CHARACTER}") for a, b in zip(found, expected, strict=True))


def test_characters_that_xml_cannot_hold_are_replaced() -> None:
    assert escaped("a\x00\x1b<\ud800>\"'&") == "a\ufffd\ufffd&lt;\ufffd&gt;&quot;&#x27;&amp;"


@given(st.floats(min_value=1e-6, max_value=1e12))
def test_an_axis_holds_its_largest_value_with_few_round_ticks(largest: float) -> None:
    axis = Axis.up_to(largest, start=10, end=110)

    assert axis.top >= largest * (1 - 1e-6)
    assert 1 <= axis.num_steps <= 5
    assert axis.position(0) == 10
    assert axis.position(axis.top) == pytest.approx(110)
    # Not more than one step is empty.
    assert axis.top - largest <= axis.step
    assert f"{axis.step:e}"[0] in "125"


def test_ticks_say_what_they_stand_for() -> None:
    axis = Axis.up_to(0.45, start=0, end=100)

    assert [text for _, text in axis.ticks()] == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5"]
    assert [x for x, _ in axis.ticks()] == pytest.approx([0, 20, 40, 60, 80, 100])
    assert [text for _, text in Axis.up_to(1720, start=0, end=1).ticks()][-1] == "2,000"
    assert Axis.up_to(100, start=0, end=1).top == 100
    assert Axis.up_to(0, start=0, end=1).top == 1


def test_an_axis_can_point_up() -> None:
    axis = Axis.up_to(10, start=200, end=100)

    assert axis.position(5) == 150


@pytest.mark.parametrize(
    ("end", "caps"), [((30, 5), {("0.0", "0.0"), ("30.0", "30.0")}), ((0, 40), {("-4.0", "4.0")})]
)
def test_caps_of_whiskers_lie_across(end: tuple[float, float], caps: set[tuple[str, str]]) -> None:
    _, *found = (ET.fromstring(x) for x in whisker((0, 5), end, "black"))

    assert {(x.attrib["x1"], x.attrib["x2"]) for x in found} == caps


def test_long_names_keep_their_end() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "…cdefg"

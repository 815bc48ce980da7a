import json

import pytest

from gemma_deploy.cli.visible import visible, visible_cell, visible_speech

ESCAPES = {
    "\x1b]0;pwned\x07": "\\u001b]0;pwned\\u0007",
    "\x1b[2J": "\\u001b[2J",
    "\x9b31m": "\\u009b31m",
    "\x00": "\\u0000",
    "\x08\x08": "\\u0008\\u0008",
    "\x7f": "\\u007f",
    "shown\rhidden": "shown\\u000dhidden",
}
DIRECTIONS = {"gnp\u202ecod.exe": "gnp\\u202ecod.exe", "\u2066a\u2069": "\\u2066a\\u2069"}
HARMLESS = "naïve 日本語 עברית العربية 👩‍🚀 e\u0301 \u00a0 \\u001b"


@pytest.mark.parametrize("show", [visible, visible_cell, visible_speech])
def test_what_commands_a_terminal_is_shown(show: object) -> None:
    assert callable(show)
    for text, expected in ESCAPES.items():
        assert show(f"a{text}b") == f"a{expected}b"
    assert show(HARMLESS) == HARMLESS


def test_what_lets_a_name_read_as_another_is_shown_but_in_speech() -> None:
    for text, expected in DIRECTIONS.items():
        assert visible(text) == visible_cell(text) == expected
        assert visible_speech(text) == text


def test_lines_end_everywhere_but_in_cells() -> None:
    assert visible("a\r\n\tb\n") == visible_speech("a\r\n\tb\n") == "a\r\n\tb\n"
    assert visible_cell("a\r\n\tb\n") == "a\\u000d\\u000a\\u0009b\\u000a"


def test_json_means_the_same() -> None:
    value = {"text": "".join([*ESCAPES, *DIRECTIONS, HARMLESS])}
    text = visible(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert text == visible(text)

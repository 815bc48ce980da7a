import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_deploy.tokenizer.control_tokens import ControlTokens, reads_as_control, split_at

CONTROL = ["<a>", "<a>b", "<ab>", "[X]", "<a b>", "<<"]
text_of_parts = st.lists(st.sampled_from(["<", "a", ">", "b", "[", "X", "]", " ", "▁"])).map(
    "".join
)


@pytest.mark.parametrize(
    "content",
    ["<start_of_turn>", "<unused98>", "[@BOS@]", "<2mass>", "<|file_separator|>", "<0x0A>"],
)
def test_bracketed_tokens_read_as_control(content: str) -> None:
    assert reads_as_control(content)


@pytest.mark.parametrize("content", ["\n\n", "▁▁", "<table>", "</h3>", "covid", "<", "[", "<>"])
def test_words_whitespace_and_html_read_as_text(content: str) -> None:
    assert not reads_as_control(content)


@given(text_of_parts)
def test_no_piece_holds_a_control_token(text: str) -> None:
    pieces = split_at(text, ControlTokens(CONTROL).cuts(text))
    assert "".join(pieces) == text
    for piece in pieces:
        assert not any(token.replace(" ", "▁") in piece.replace(" ", "▁") for token in CONTROL)


@given(text_of_parts)
def test_text_is_cut_only_inside_control_tokens(text: str) -> None:
    for cut in ControlTokens(CONTROL).cuts(text):
        start = text[cut - 1 :].replace(" ", "▁")
        assert any(start.startswith(token.replace(" ", "▁")) for token in CONTROL)


def test_matches_are_leftmost_longest_and_disjoint() -> None:
    assert ControlTokens(CONTROL).found("x<<a>b<a>[X]<a b>") == ["<<", "<a>", "[X]", "<a▁b>"]


def test_a_token_at_the_end_of_the_text_ends_there() -> None:
    assert list(ControlTokens(["<a>", "<long>"]).matches("x<a>")) == [(1, 4)]


def test_without_control_tokens_nothing_is_cut() -> None:
    assert ControlTokens([]).cuts("<bos>") == []


def test_one_character_counts_as_text() -> None:
    assert ControlTokens(["§"]).cuts("§") == []


def test_time_does_not_grow_with_the_number_of_tokens() -> None:
    many = ControlTokens(f"<unused{index}>" for index in range(6000))
    start = time.perf_counter()
    many.cuts("<" * 100_000)
    # A tenth of what trying every token at every position takes.
    assert time.perf_counter() - start < 5

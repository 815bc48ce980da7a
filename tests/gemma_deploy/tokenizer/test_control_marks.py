import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer.control_marks import ControlMarks, unused_characters
from gemma_deploy.tokenizer.control_tokens import ControlTokens

CONTROL = ControlTokens(["<a>", "<a b>", "[X]"])
texts = st.lists(st.sampled_from(["<a>", "<a b>", "<a▁b>", "[X]", "<", "a>", " ", "\U000f0000"]))


@given(texts.map("".join))
def test_restored_is_what_was_marked(text: str) -> None:
    marks = ControlMarks(CONTROL, set(text))
    marked = marks.marked(text)
    assert CONTROL.found(marked) == []
    assert marks.restored(marked) == (text, list(CONTROL.matches(text)))


def test_one_mark_a_token_and_none_for_those_exempt() -> None:
    marks = ControlMarks(CONTROL, {"\U000f0000"})
    assert marks.marked("<a>[X]<a>") == "\U000f0001\U000f0002\U000f0001"
    assert marks.marked("<a b>[X]", exempt={"<a▁b>"}) == "<a b>\U000f0002"
    assert ControlMarks(CONTROL, (), marks.by_token).marked("[X]") == "\U000f0002"


def test_every_private_use_character() -> None:
    with pytest.raises(TokenizerError, match="too many of the private-use characters"):
        next(unused_characters(set(map(chr, range(0x110000)))))

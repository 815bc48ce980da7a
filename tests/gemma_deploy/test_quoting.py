import pytest

from gemma_deploy.quoting import shortened, shortened_text


@pytest.mark.parametrize("value", ["short", 5, None, ["a", {"b": 1.5}], "x" * 78, "\ud800"])
def test_what_is_short_is_quoted_whole(value: object) -> None:
    assert shortened(value) == repr(value)


def test_what_is_long_is_cut_and_measured() -> None:
    assert shortened("a" * 1_000_000, 5) == "'aaaa… (1,000,002 characters)"
    assert shortened(list(range(10**5))).startswith("[0, 1, 2, ")
    assert len(shortened(list(range(10**5)))) < 110


def test_what_cannot_be_quoted_is_named() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert shortened(nested) == "a list that is too large to show"
    assert shortened(10**5000) == "a int that is too large to show"
    while nested:  # taken apart here: freeing it in one go recurses in C
        nested = nested.pop()  # type: ignore[assignment]  # lists all the way down


def test_text_stays_without_quotes() -> None:
    assert shortened_text("it's") == "it's"
    assert shortened_text("abcdef", 3) == "abc… (6 characters)"

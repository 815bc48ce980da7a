import pytest

from gemma_deploy.quoting import shortened


@pytest.mark.parametrize("value", [3, "text", [1, 2], None, "x" * 78])
def test_short_values_are_quoted_whole(value: object) -> None:
    assert shortened(value) == repr(value)


def test_a_long_value_keeps_its_ends() -> None:
    assert shortened(list(range(100_000)), limit=25) == "[0, 1, 2,  ... 98, 99999]"
    assert len(shortened("x" * 10_000)) <= 80

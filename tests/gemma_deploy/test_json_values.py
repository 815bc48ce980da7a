"""Values out of JSON, held against types."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from gemma_deploy.json_values import typed, whole

_XY = Literal["x", "y"]


@dataclass(frozen=True)
class Inner:
    size: int
    note: str | None = None


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    kinds: Mapping[Literal["a", "b"], float]
    dtype: _XY | Literal["z"]
    is_on: bool = False


RAW: dict[str, Any] = {"inner": [{"size": 1}], "kinds": {"a": 1, "b": 0.5}, "dtype": "z"}


def test_a_dataclass() -> None:
    assert typed(Outer, RAW, "it") == Outer((Inner(1),), {"a": 1, "b": 0.5}, "z")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {}}, r"it\.inner is {}, expected a list"),
        ({"inner": [3]}, r"it\.inner\[0\] is 3, expected a JSON object"),
        ({"inner": [{}]}, r"it\.inner\[0\] lacks size"),
        ({"inner": [{"size": True}]}, r"size is True, expected an integer"),
        ({"inner": [{"size": "5"}]}, r"size is '5', expected an integer"),
        ({"inner": [{"size": 1.0}]}, r"size is 1\.0, expected an integer"),
        ({"inner": [{"size": 1 << 63}]}, r"size is 9223372036854775808, expected an integer"),
        ({"inner": [{"size": 1, "note": 5}]}, r"note is 5, expected a string"),
        ({"inner": [{"size": 1, "other": 5}]}, r"holds 'other', expected size, note"),
        ({"kinds": []}, r"kinds is \[\], expected a JSON object"),
        ({"kinds": {"c": 1}}, r"kinds is 'c', expected one of a, b"),
        ({"kinds": {"a": float("nan")}}, r"kinds\.a is nan, expected a finite number"),
        ({"kinds": {"a": float("inf")}}, r"kinds\.a is inf, expected a finite number"),
        ({"kinds": {"a": 10**400}}, r"kinds\.a is 10{79}… .*, expected a finite number"),
        ({"kinds": {"a": False}}, r"kinds\.a is False, expected a finite number"),
        ({"dtype": []}, r"dtype is \[\], expected one of x, y, z"),
        ({"is_on": 1}, r"is_on is 1, expected true or false"),
    ],
)
def test_what_is_not_of_its_type(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        typed(Outer, RAW | change, "it")


def test_what_is_no_object() -> None:
    with pytest.raises(ValueError, match=r"it is \[1\], expected a JSON object"):
        typed(Outer, [1], "it")


@pytest.mark.parametrize("value", [0, 11, True, 5.0, "5", None, float("nan")])
def test_whole_numbers_of_a_range(value: object) -> None:
    assert whole(10, "n", 1, 10) == 10
    with pytest.raises(ValueError, match=r"n is .*, expected a whole number from 1 to 10"):
        whole(value, "n", 1, 10)

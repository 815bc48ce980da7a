"""Values out of JSON held against the types that they are to have: `typed`."""

import dataclasses
import functools
import sys
import types
from collections.abc import Mapping
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from gemma_deploy.quoting import shortened, shortened_text

_INT64: Final = 1 << 63


def typed(kind: Any, value: object, name: str) -> Any:
    """Return a value if it is of a kind, lists as tuples and objects as the dataclasses they are.

    Args:
        kind: `bool`, `int` (of 64 bits), `float` (finite; whole numbers stay ints), `str`, a Literal,
            one of these or None, `tuple[kind, ...]`, `Mapping[str, kind]`, or a dataclass whose fields
            are of these kinds: those without a default must be there, and no others.
        value: As `json` parses it.
        name: What an error calls it.

    Raises:
        ValueError: It is not; with what was expected and found.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _one_of(args, value, name)
    if origin is tuple:
        items = _checked(value, name, isinstance(value, list | tuple), "a list")
        return tuple(typed(args[0], x, f"{name}[{i}]") for i, x in enumerate(items))
    if origin is Literal:
        is_known = isinstance(value, str) and value in args
        return _checked(value, name, is_known, f"one of {', '.join(args)}")
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, name)
    if origin is Mapping:
        items = _checked(value, name, isinstance(value, Mapping), "a JSON object")
        return {
            typed(args[0], key, name): typed(args[1], x, f"{name}.{shortened_text(key, 40)}")
            for key, x in items.items()
        }
    return _plain(kind, value, name)


def whole(value: object, name: str, least: int, most: int) -> int:
    """Return a whole number of a range, which no bool is.

    Raises:
        ValueError: It is none; with what was expected and found.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _error(value, name, f"a whole number from {least:,} to {most:,}")
    return value


def _one_of(kinds: tuple[Any, ...], value: object, name: str) -> Any:
    """Return a value of a kind or None, or of one of several Literals."""
    if value is None and types.NoneType in kinds:
        return None
    literals = tuple(x for kind in kinds if get_origin(kind) is Literal for x in get_args(kind))
    kind = next(x for x in kinds if x is not types.NoneType)
    return typed(Literal[literals] if literals else kind, value, name)


def _plain(kind: Any, value: Any, name: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return _checked(value, name, isinstance(value, bool), "true or false")
    if kind is int:
        is_int = is_number and isinstance(value, int) and -_INT64 <= value < _INT64
        return _checked(value, name, is_int, "an integer")
    if kind is float:
        is_finite = is_number and abs(value) <= sys.float_info.max
        return _checked(value, name, is_finite, "a finite number")
    return _checked(value, name, isinstance(value, str), "a string")


def _record(kind: Any, value: object, name: str) -> Any:
    raw = _checked(value, name, isinstance(value, Mapping), "a JSON object")
    kinds = _kinds(kind)
    for key in raw:
        if key not in kinds:
            raise ValueError(f"{name} holds {shortened(key)}, expected {', '.join(kinds)}")
    for field in dataclasses.fields(kind):
        is_needed = field.default is field.default_factory is dataclasses.MISSING
        if is_needed and field.name not in raw:
            raise ValueError(f"{name} lacks {field.name}")
    return kind(**{key: typed(kinds[key], x, f"{name}.{key}") for key, x in raw.items()})


@functools.cache
def _kinds(kind: Any) -> Mapping[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _checked(value: Any, name: str, is_right: bool, expected: str) -> Any:
    if not is_right:
        raise _error(value, name, expected)
    return value


def _error(value: object, name: str, expected: str) -> ValueError:
    return ValueError(f"{name} is {shortened(value)}, expected {expected}")

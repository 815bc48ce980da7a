"""What a chat template may spend: `Meter` counts steps and characters, before they are spent.

A unit stands for a character that is copied, or some 10 ns. What a step costs is told beforehand: the
operations that can make much of little (`'a' * 10**10`, `center`, `%10000000d`, `replace`), or search
again at each character (`rfind`), are priced by their operands, all others by the size of what they work
on. Whole numbers have 64 bits: all that is done with them is cheap, and few have one hash.
"""

import re
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

from gemma_deploy.errors import TokenizerError

STEP: Final = 8
"""Units of one operation, item or iteration."""

_BASE: Final = 16_000_000
_PER_UNIT: Final = 250  # of the conversation
_MAX_DEPTH: Final = 100
MAX_INT_BITS: Final = 64
"""Those of a whole number in a template."""

_CONTAINERS: Final = (list, tuple, dict, set, frozenset, range, KeysView, ValuesView, ItemsView)
_PADDED: Final = re.compile(r"%[^a-zA-Z%]*")
_NUMBER: Final = re.compile(r"\d+")

# They look at items one by one, or at none: what the items hold does not matter.
_BY_ITEM: Final = frozenset(
    {"select", "reject", "selectattr", "rejectattr", "map", "list", "reverse"}
)
_OF_THE_OUTSIDE: Final = frozenset({"length", "count", "first", "last", "random", "default", "d"})
_OF_MAPPINGS: Final = frozenset({"get", "items", "keys", "values", "attr"})
# What comes out can be as long as the product of what goes in.
_CHUNKS: Final = frozenset({"batch", "slice"})
_PADDING: Final = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent"})
_SHALLOW: Final = _BY_ITEM | _OF_THE_OUTSIDE | _OF_MAPPINGS | _CHUNKS
# They may compare all of a text that they are given at each character; searches from the left do not.
_SEARCHES: Final = frozenset(
    {"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip", "trim"}
)
_BY_PRODUCT: Final = _CHUNKS | _PADDING | {"join", "translate"}


class Items(Iterator[Any]):
    """What a filter yields, taken at once; true even if it is empty, as a generator is."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self._next = iter(items)

    def __next__(self) -> Any:
        return next(self._next)


class Meter:
    """What is left to one rendering.

    Args:
        given: What it is given: conversations that are longer may cost more.
    """

    def __init__(self, *given: Any) -> None:
        self._left = self._all = _BASE
        spent = sum(self.size(value) for value in given)
        self._left = self._all = _BASE + _PER_UNIT * spent

    def charge(self, units: int) -> None:
        """Take units off what is left.

        Raises:
            TokenizerError: There are not as many.
        """
        self._left -= units
        if self._left < 0:
            raise TokenizerError(
                "The chat template takes too many steps or makes too much text (more than "
                f"{self._all:,} units for this conversation): it may have been written to exhaust "
                "the machine. Use the template of the original model, as chat_template.jinja."
            )

    def size(self, value: Any) -> int:
        """Return the units of a value with all that it holds: writing or comparing it costs them.

        Raises:
            TokenizerError: That is more than is left, or it is nested too deeply.
        """
        if isinstance(value, str | int):
            return STEP + length(value)
        units = 0
        stack = [(value, 0)]
        while stack:
            one, depth = stack.pop()
            units += STEP + length(one)
            if units > self._left or depth > _MAX_DEPTH:
                self.charge(self._left + 1)
            stack += [(child, depth + 1) for child in _children(one)]
        return units

    def taken(self, value: Any) -> Any:
        """Return a value; an iterator as `Items`, so that its size is known."""
        if isinstance(value, Items) or not isinstance(value, Iterator):
            return value
        items = []
        for item in value:
            self.charge(STEP)
            items.append(item)
        return Items(items)

    def charge_call(self, name: str, values: list[Any]) -> None:
        """Charge for a filter or a method of a built-in type before it is called.

        Args:
            name: Its name.
            values: What it works on, then its arguments.
        """
        first, arguments = values[0], values[1:]
        size = STEP + length(first) if name in _SHALLOW else self.size(first)
        if name in _SEARCHES:
            times = size
        elif name in _OF_MAPPINGS or not isinstance(first, _CONTAINERS):
            times = 1
        else:
            times = 0 if name in _OF_THE_OUTSIDE else length(first)
        walked = sum(len(x) if isinstance(x, str) else self.size(x) for x in arguments)
        self.charge((1 if isinstance(first, str) else 4) * size + times * walked)
        if name == "replace":
            self._charge_replace(str(first), *arguments[:2])
        elif name == "tojson" and any(x is not None for x in arguments):
            self.charge(size * _product(map(self._extent, arguments)) * _MAX_DEPTH)
        elif name == "striptags":  # it copies what is left for each tag
            self.charge(size * str(first).count("<"))
        elif name == "format":
            self.charge_format(str(first), arguments)
        elif name == "sum" and any(isinstance(x, list | tuple) for x in arguments):
            self.charge(size * length(first))
        elif name == "round" and arguments:
            self.charge(self._extent(arguments[0]) ** 2)
        elif name in _BY_PRODUCT:
            self.charge(size * _product(map(self._extent, arguments)))

    def charge_operator(self, operator: str, left: Any, right: Any) -> None:
        """Charge for a binary operator before it is applied."""
        if operator == "%" and isinstance(left, str):
            self.charge_format(left, [right])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            is_huge = left.bit_length() * right > 2 * MAX_INT_BITS
            self.charge(self._left + 1 if is_huge else STEP)
        elif operator == "*" and not (isinstance(left, int) and isinstance(right, int)):
            self.charge(_product(map(self._extent, (left, right))))
        elif operator == "+":
            self.charge(STEP + length(left) + length(right))
        else:  # between views of mappings it hashes
            self.charge(self.size(left) + self.size(right))

    def charge_format(self, text: str, arguments: list[Any]) -> None:
        """Charge for `text % arguments`: each can stand in many places, padded."""
        padded = text if "%(" in text else " ".join(_PADDED.findall(text))
        self.charge_widths(padded)
        if "*" in padded:  # widths are among the arguments
            self.charge(_product(map(self._extent, _flat(arguments))))
        self.charge((STEP + len(text)) * sum(map(self.size, arguments)))

    def charge_widths(self, text: str) -> None:
        """Charge for the numbers in a format: it is padded to them."""
        self.charge(sum(int(x[:20]) for x in _NUMBER.findall(text)))

    def charge_result(self, value: Any) -> None:
        """Charge for what came out of a call.

        Raises:
            TokenizerError: As `charge`; or it is a number beyond all use.
        """
        numbers = (value.start, value.stop, value.step) if isinstance(value, range) else (value,)
        is_huge = any(isinstance(x, int) and x.bit_length() > MAX_INT_BITS for x in numbers)
        self.charge(self._left + 1 if is_huge else STEP + length(value))

    def _charge_replace(self, text: str, old: Any, new: Any) -> None:
        one, other = str(old), str(new)  # in either order, where they are given by name
        self.charge(max(text.count(one) * len(other), text.count(other) * len(one)))

    def _extent(self, value: Any) -> int:
        """Return by how much a value can multiply another: a number is a width or a count."""
        if isinstance(value, int | float):
            return max(1, min(abs(int(value)), 1 << 63)) if value == value else 1  # noqa: PLR0124 - NaN
        return len(value) if isinstance(value, str) else self.size(value)


def length(value: Any) -> int:
    """Return the units of a value without what it holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Items):
        return STEP * len(value.items)
    if isinstance(value, _CONTAINERS):
        return STEP * len(value)
    return value.bit_length() >> 3 if isinstance(value, int) else 0


def _flat(arguments: list[Any]) -> Iterator[Any]:
    for argument in arguments:
        yield from argument if isinstance(argument, tuple) else [argument]


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Items):
        return value.items
    if isinstance(value, dict):  # not by its own methods: it may be watched
        return [*dict.keys(value), *dict.values(value)]
    return value if isinstance(value, _CONTAINERS) and not isinstance(value, range) else ()


def _product(factors: Iterable[int]) -> int:
    product = 1
    for factor in factors:
        product = min(product * max(1, factor), 1 << 63)
    return product


_CURRENT: Final[ContextVar[Meter]] = ContextVar("gemma_deploy.tokenizer.template_meter")


def current_meter() -> Meter:
    """Return the meter of the rendering that this is called in.

    Raises:
        LookupError: Nothing is rendered: templates are compiled without.
    """
    return _CURRENT.get()


@contextmanager
def metered(*given: Any) -> Iterator[None]:
    """Count what a template spends within the block; see `Meter`."""
    token = _CURRENT.set(Meter(*given))
    try:
        yield
    finally:
        _CURRENT.reset(token)

"""The tensors of an ONNX file that point into other files, found without the onnx package.

A machine that only runs bundles needs neither onnx nor protobuf. Read is as much of protobuf's wire
format as leads to tensors; what is not understood is refused, never passed over, since another reader
might understand it. Sources: https://protobuf.dev/programming-guides/encoding,
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

Value: TypeAlias = int | memoryview

# Of each message the fields that lead to tensors: number -> message. Names are onnx.proto's.
CHILDREN: Final[Mapping[str, Mapping[int, str]]] = MappingProxyType(
    {
        "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
        "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
        "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
        "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
        "NodeProto": {5: "AttributeProto"},
        "AttributeProto": {
            5: "TensorProto",
            10: "TensorProto",
            6: "GraphProto",
            11: "GraphProto",
            22: "SparseTensorProto",
            23: "SparseTensorProto",
        },
        "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
        "TensorProto": {},
    }
)
# Those of them that a message has once: given twice, protobuf merges them into one.
SINGLE: Final = frozenset(
    {("ModelProto", 7), ("TrainingInfoProto", 1), ("TrainingInfoProto", 2)}
    | {("AttributeProto", 5), ("AttributeProto", 6), ("AttributeProto", 22)}
    | {("SparseTensorProto", 1), ("SparseTensorProto", 2)}
)
_TENSOR_NAME, _EXTERNAL_DATA, _DATA_LOCATION, _EXTERNAL = 8, 13, 14, 1
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _64_BITS, _BYTES, _32_BITS = 0, 1, 2, 5
_MOST_VARINT_BYTES: Final = 10
_HIGHEST_FIELD: Final = 2**29 - 1
_MOST_NESTED_MESSAGES: Final = 100  # protobuf's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalTensor:
    """A tensor whose elements are in another file.

    Attributes:
        name: Its name.
        entries: What is said of the place: `location`, `offset`, `length`.
    """

    name: str
    entries: Mapping[str, str]


def external_tensors(model: bytes) -> Iterator[ExternalTensor]:
    """Yield the external tensors of a serialized model: of graphs, subgraphs, attributes, functions.

    Raises:
        ValueError: The bytes are no model, or one that readers could take for different things.
    """
    yield from _tensors("ModelProto", memoryview(model), _MOST_NESTED_MESSAGES)


def _tensors(message: str, data: memoryview, depth: int) -> Iterator[ExternalTensor]:
    if message == "TensorProto":
        yield from _external(data)
        return
    if not depth:
        raise ValueError(f"messages are nested more than {_MOST_NESTED_MESSAGES} deep")
    children = CHILDREN[message]
    seen = set()
    for number, value in _fields(data):
        child = children.get(number)
        if child is None:
            continue
        if (message, number) in SINGLE and number in seen:
            raise ValueError(f"a {message} has its field {number} twice")
        seen.add(number)
        yield from _tensors(child, _bytes(value), depth - 1)


def _external(data: memoryview) -> Iterator[ExternalTensor]:
    """Yield the tensor if it is, or could be taken for, an external one."""
    name, entries, is_external = "", dict[str, str](), False
    for number, value in _fields(data):
        if number == _TENSOR_NAME:
            name = bytes(_bytes(value)).decode(errors="replace")
        elif number == _EXTERNAL_DATA:
            key, text = _entry(_bytes(value))
            if key in entries:
                raise ValueError(f"the tensor {name} has two entries {key!r} of external data")
            entries[key] = text
        elif number == _DATA_LOCATION:
            is_external |= value == _EXTERNAL
    if is_external or entries:
        yield ExternalTensor(name=name, entries=MappingProxyType(entries))


def _entry(data: memoryview) -> tuple[str, str]:
    """Return key and value of a StringStringEntryProto."""
    fields = list(_fields(data))
    texts = {number: bytes(_bytes(value)).decode() for number, value in fields}
    if len(texts) < len(fields):
        raise ValueError("an entry of external data has a field twice")
    return texts.get(_ENTRY_KEY, ""), texts.get(_ENTRY_VALUE, "")


def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """Yield number and value of each field of a message."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if not 0 < number <= _HIGHEST_FIELD:  # readers drop bits that are too many, and see another
            raise ValueError(f"a field has the number {number}")
        value: Value
        if kind == _VARINT:
            value, position = _varint(data, position)
        elif kind in (_64_BITS, _32_BITS, _BYTES):
            size = 8 if kind == _64_BITS else 4
            if kind == _BYTES:
                size, position = _varint(data, position)
            if position + size > len(data):
                raise ValueError("a field does not end within its message")
            value, position = data[position : position + size], position + size
        else:
            raise ValueError(f"a field is of kind {kind}, which ONNX does not use")
        yield number, value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, and the position behind it."""
    value = 0
    for index, byte in enumerate(data[position : position + _MOST_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError("a number does not end")


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a field holds a number where bytes are expected")  # noqa: TRY004 - of the file, not of a caller
    return value

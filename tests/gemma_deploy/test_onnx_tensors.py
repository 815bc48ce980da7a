"""Against the onnx package: its messages, and what it reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gemma_deploy.onnx_tensors import CHILDREN, SINGLE, external_tensors


def _fields_to(descriptor: Any, seen: frozenset[str] = frozenset()) -> bool:
    """Tell whether a message can hold a TensorProto."""
    if descriptor.name == "TensorProto":
        return True
    if descriptor.name in seen:
        return False
    seen |= {descriptor.name}
    return any(f.message_type and _fields_to(f.message_type, seen) for f in descriptor.fields)


def _messages(descriptor: Any, found: dict[str, Any]) -> dict[str, Any]:
    if descriptor.name not in found:
        found[descriptor.name] = descriptor
        for field in descriptor.fields:
            if field.message_type is not None and _fields_to(field.message_type):
                _messages(field.message_type, found)
    return found


def test_the_table_is_that_of_onnx() -> None:
    messages = _messages(onnx.ModelProto.DESCRIPTOR, {})
    leading = {
        name: {
            field.number: field
            for field in message.fields
            if name != "TensorProto" and field.message_type and _fields_to(field.message_type)
        }
        for name, message in messages.items()
    }

    table = {
        name: {number: field.message_type.name for number, field in fields.items()}
        for name, fields in leading.items()
    }
    assert table == CHILDREN
    single = {
        (name, number)
        for name, fields in leading.items()
        for number, field in fields.items()
        if not _is_repeated(field)
    }
    assert single == SINGLE


def _is_repeated(field: Any) -> bool:
    repeated = getattr(field, "is_repeated", None)
    return bool(field.label == field.LABEL_REPEATED if repeated is None else repeated)


def _by_onnx(message: Any) -> Iterator[tuple[str, dict[str, str]]]:
    if message.DESCRIPTOR.name == "TensorProto":
        if message.data_location == TensorProto.EXTERNAL:
            yield message.name, {item.key: item.value for item in message.external_data}
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                yield from _by_onnx(child)


def found(model: bytes) -> list[tuple[str, dict[str, str]]]:
    return [(tensor.name, dict(tensor.entries)) for tensor in external_tensors(model)]


@pytest.mark.parametrize("name", ["gemma1", "gemma3"])
def test_graphs_of_bundles(name: str, tiny_bundle: Any) -> None:
    graphs: list[Path] = sorted(tiny_bundle(name, "float16").glob("*.onnx"))
    assert len(graphs) == 6
    for graph in graphs:
        expected = list(_by_onnx(onnx.load(graph, load_external_data=False)))
        assert len(expected) > 10
        assert sorted(found(graph.read_bytes()), key=str) == sorted(expected, key=str)


def external(name: str, **entries: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model_of(*tensors: TensorProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([], "g", [], [], initializer=tensors))


class TestRefused:
    """What protobuf would merge, so that parts that are harmless make a whole that is not."""

    def test_a_second_graph(self) -> None:
        one, two = (model_of(external("w", location=x)) for x in ("a", "b"))

        with pytest.raises(ValueError, match="a ModelProto has its field 7 twice"):
            found(one.SerializeToString() + two.SerializeToString())

    def test_an_attribute_in_two_parts(self) -> None:
        node = helper.make_node("Constant", [], ["y"], value=external("w", location="../secret"))
        (attribute,) = node.attribute
        merged = onnx.AttributeProto(t=TensorProto(name="harmless"))
        raw = attribute.SerializeToString() + merged.SerializeToString()
        length = len(raw)
        assert length < 128
        wrapped = _field(7, _field(1, _field(5, raw)))  # model, graph, node
        assert onnx.ModelProto.FromString(wrapped).graph.node[0].attribute[0].t.name == "harmless"

        with pytest.raises(ValueError, match="AttributeProto has its field 5 twice"):
            found(wrapped)

    def test_a_key_twice(self) -> None:
        tensor = external("w", location="a")
        tensor.external_data.add(key="location", value="b")

        with pytest.raises(ValueError, match="the tensor w has two entries 'location'"):
            found(model_of(tensor).SerializeToString())

    def test_deep_nesting(self) -> None:
        raw = b""
        for _ in range(60):  # graph of a node of an attribute of a graph ...
            raw = _field(1, _field(5, _field(6, raw)))

        with pytest.raises(ValueError, match="nested more than 100 deep"):
            found(_field(7, raw))

    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (b"no graph", "is of kind 6"),
            (b"\x3a\x05ab", "does not end within its message"),
            (b"\x3a" + b"\xff" * 10, "a number does not end"),
            (b"\x3b", "is of kind 3"),
            (b"\x38\x01", "a number where bytes are expected"),
            (b"\x02\x00", "a field has the number 0"),
            (b"\x00\x00", "a field has the number 0"),
            # Of 35 bits, of which the lower 32 say field 7.
            (b"\xba\x80\x80\x80\x10\x00", "a field has the number 536870919"),
        ],
    )
    def test_what_is_no_model(self, raw: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            found(raw)

    def test_a_location_that_is_not_utf_8(self) -> None:
        raw = model_of(external("w", location="weights")).SerializeToString()

        with pytest.raises(ValueError, match="invalid start byte"):
            found(raw.replace(b"weights", b"wei\xffhts"))


def test_entries_count_whatever_the_location_says() -> None:
    tensor = external("w", location="a")
    tensor.data_location = TensorProto.DEFAULT

    assert found(model_of(tensor).SerializeToString()) == [("w", {"location": "a"})]


@given(st.binary(max_size=40), st.integers(0, 200))
def test_no_tensor_that_onnx_sees_is_missed(noise: bytes, place: int) -> None:
    raw = model_of(external("w", location="a", offset="1", length="2")).SerializeToString()
    changed = raw[:place] + noise + raw[place + len(noise) :]
    try:
        expected = list(_by_onnx(onnx.ModelProto.FromString(changed)))
    except (DecodeError, UnicodeDecodeError):
        expected = []
    try:
        ours = found(changed)
    except ValueError:
        return
    assert all(tensor in ours for tensor in expected)


def _field(number: int, content: bytes) -> bytes:
    """Return a field of bytes as protobuf writes it."""
    size, encoded = len(content), b""
    while size >= 0x80:
        encoded += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + encoded + bytes([size]) + content

"""Files changed at random, always the same way for a seed: bytes, or the JSON that they hold."""

import contextlib
import json
import random
from collections.abc import Callable
from typing import Any

# Written in the place of their names when a value becomes text: `json` could not write them itself.
_RAW = {
    "@deep": "[" * 100_000 + "]" * 100_000,
    "@deeper than ours": "[" * 70 + "]" * 70,
    "@objects": '{"a":' * 5000 + "1" + "}" * 5000,
    "@digits": "1" * 5000,
    "@exponent": "1e999",
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@surrogate": '"\\ud800"',
    "@zero": '"\\u0000"',
}
_VALUES: list[Any] = [
    *_RAW,
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**32, 2**63 - 1, 2**63, 10**6, 10**12, 10**30),
    *(10**400, -(10**12), 0.5, -0.0, 1e308, 1e-320, 5.0),
    *("", "a", "5", "a" * 300, "a" * 100_000, "../../etc/passwd", "/etc/passwd", "C:\\x", "x\\y"),
    *(
        "\x1b[31m",
        "\n",
        "é\u202e",
        "<bos>",
        "float16",
        "full_attention",
        "int4/0",
        "int4/32",
        "{{ 1 }}",
    ),
    *(
        [],
        {},
        [[]],
        [None],
        [1, "a"],
        {"a": None},
        {"": {}},
        ["x"] * 2000,
        list(range(5000)),
        [{}] * 9,
    ),
]
_SNIPPETS = (
    *(
        "{%",
        "%}",
        "{{",
        "}}",
        "{#",
        "#}",
        "{% endfor %}",
        "{% for i in range(9999) %}",
        "loop",
        "((",
    ),
    *(
        "{{ messages }}",
        "|tojson(indent=99)",
        "* 10**9",
        "|center(10**9)",
        "namespace(x=1)",
        "~",
        "'",
    ),
    *(
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% if %}",
        "[",
        "]",
        ".x",
        "|map('upper')",
    ),
)


def mutated_json(rng: random.Random, raw: bytes) -> bytes:
    """Return a JSON text with some of its values changed; one in four times its bytes instead."""
    if rng.random() < 0.25:
        return mutated_bytes(rng, raw)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):  # a line that was changed before
        return mutated_bytes(rng, raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _changed(rng, value)
    return _written(value)


def mutated_lines(rng: random.Random, raw: bytes) -> bytes:
    """Return lines of JSON of which some are changed."""
    lines = raw.splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        lines[at] = mutated_json(rng, lines[at]).replace(b"\n", b" ") or b"{}"
    if rng.random() < 0.2:
        rng.shuffle(lines)
    return b"\n".join([line if line.strip() else b"{}" for line in lines]) + rng.choice(
        (b"\n", b"")
    )


def mutated_safetensors(rng: random.Random, raw: bytes) -> bytes:
    """Return a safetensors file whose header, or whose bytes, are changed."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, raw)
    size = int.from_bytes(raw[:8], "little")
    header = mutated_json(rng, raw[8 : 8 + size])
    stated = (
        len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63, len(header) + 8))
    )
    return stated.to_bytes(8, "little") + header + raw[8 + size :]


def mutated_template(rng: random.Random, raw: bytes) -> bytes:
    """Return a template with pieces of others in it."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, raw)
    text = raw.decode()
    for _ in range(rng.choice((1, 2, 4))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 0, 1, 5, 40)))
        text = text[:start] + rng.choice(_SNIPPETS) * rng.choice((1, 1, 1, 2, 300)) + text[end:]
    return text.encode()


def mutated_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Return bytes that are cut, flipped, moved, or mixed with others."""
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 2, 8, 100))
        kind = rng.randrange(7)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2 and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 3:
            changed[at:at] = rng.randbytes(length)
        elif kind == 4:
            changed[at:at] = changed[: length * 10]
        elif kind == 5:
            changed[at : at + length] = (
                rng.choice((b"\x00", b"\xff", b"\xef\xbb\xbf", b'"')) * length
            )
        else:
            changed[at : at + length] = rng.randbytes(length)
    return bytes(changed)


def mutated_onnx(rng: random.Random, raw: bytes) -> bytes:
    """Return an ONNX model of which a few fields are changed."""
    if rng.random() < 0.4:
        return mutated_bytes(rng, raw)
    import onnx

    model = onnx.load_from_string(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_field(rng, model)
    changed: bytes = model.SerializeToString()
    return changed


def _change_field(rng: random.Random, message: Any) -> None:
    """Change a field of a protobuf message, or of one that it holds."""
    fields = message.ListFields()
    if not fields:
        return
    field, value = rng.choice(fields)
    is_list = not isinstance(value, str | bytes | int | float) and hasattr(value, "__len__")
    if is_list and len(value) and (field.message_type is None or rng.random() < 0.15):
        at = rng.randrange(len(value))
        if rng.random() < 0.5 or field.message_type is not None:
            del value[at]
        else:
            value[at] = _scalar(rng, value[at])
    elif is_list and len(value):
        _change_field(rng, rng.choice(value))
    elif field.message_type is not None:
        _change_field(rng, value)
    else:
        with contextlib.suppress(ValueError):  # an enumeration has no such member
            setattr(message, field.name, _scalar(rng, value))


def _scalar(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bytes):
        return mutated_bytes(rng, value)
    if isinstance(value, str):
        return rng.choice(("", "x", "9" * 5000, "-1", "../x", value + "x", "a" * 10_000, "MatMul"))
    if isinstance(value, float):
        return rng.choice((0.0, float("nan"), 1e30))
    return rng.choice((0, 1, 2, 7, 16, 127))


def _changed(rng: random.Random, value: Any) -> Any:
    """Return a JSON value with one change somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        return _changed_object(rng, value)
    if isinstance(value, list) and value and rng.random() < 0.8:
        items = list(value)
        at = rng.randrange(len(items))
        if rng.random() < 0.15:
            del items[at]
        elif rng.random() < 0.1:
            items.insert(at, rng.choice(_VALUES))
        else:
            items[at] = _changed(rng, items[at])
        return items
    return rng.choice(_VALUES)


def _changed_object(rng: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    body = dict(value)
    key = rng.choice(list(body))
    kind = rng.random()
    if kind < 0.1:
        del body[key]
    elif kind < 0.15:
        body[rng.choice(("x", "", "a" * 300, "../x", "\x00", "@surrogate"))] = rng.choice(_VALUES)
    elif kind < 0.2:
        other = rng.choice(list(body))
        body[key], body[other] = body[other], body[key]
    else:
        body[key] = _changed(rng, body[key])
    return body


def _written(value: Any) -> bytes:
    text = json.dumps(value)
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode()


Mutation = Callable[[random.Random, bytes], bytes]

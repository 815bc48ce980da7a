import itertools
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from gemma_deploy.errors import SessionError
from gemma_deploy.runtime.sessions import aligned_blobs
from gemma_deploy.runtime.sessions.aligned_blobs import ALIGNMENT_BYTES, align_blobs

CONTENTS = b"table" * 3, b"codes", b"P" * 5000, b"Q" * 9, b"scales!"
OPERATOR = "MatMulNBits+123"


def save(folder: Path, tensors: list[dict[str, str]], data: bytes) -> tuple[Path, Path]:
    """Write a model whose tensors' external data is as given."""
    model = helper.make_model(helper.make_graph([], "g", [], []))
    for number, entries in enumerate(tensors):
        tensor = model.graph.initializer.add(
            name=f"t{number}",
            data_type=TensorProto.UINT8,
            dims=[int(entries.get("length", "1"))],
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
    # A small one is in the model itself.
    model.graph.initializer.add(name="inline", data_type=TensorProto.UINT8, dims=[1], raw_data=b"x")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "weights.bin").write_bytes(data)
    return folder / "model.onnx", folder / "weights.bin"


def entries_of(model_file: Path) -> list[dict[str, str]]:
    model = onnx.load(model_file, load_external_data=False)
    return [{x.key: x.value for x in t.external_data} for t in model.graph.initializer[:-1]]


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_every_byte_moves_to_a_page_and_none_changes(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aligned_blobs, "_BLOCK_BYTES", block_bytes)
    table, codes, first, second, scales = itertools.accumulate(map(len, CONTENTS[:-1]), initial=0)
    file = {"location": "weights.bin"}
    blobs = f"{first};5000;0|{second};9;1"
    tensors = [
        file | {"offset": str(codes), "length": "5", "prepacked_0": f"{OPERATOR}|{blobs}"},
        file | {"offset": str(table), "length": "15"},
        file | {"offset": str(scales), "length": "7"},
    ]
    model_file, data = save(tmp_path, tensors, b"".join(CONTENTS))
    align_blobs(model_file, data)

    packed, table_entry, scales_entry = entries_of(model_file)
    operator, *moved = packed["prepacked_0"].split("|")
    assert operator == OPERATOR
    assert [blob.split(";")[2] for blob in moved] == ["0", "1"]
    places = [(int(x["offset"]), int(x["length"])) for x in (table_entry, packed, scales_entry)]
    places[2:2] = [(int(o), int(n)) for o, n, _ in (blob.split(";") for blob in moved)]
    content = data.read_bytes()
    assert all(offset % ALIGNMENT_BYTES == 0 for offset, _ in places)
    assert tuple(content[offset : offset + length] for offset, length in places) == CONTENTS


def test_what_is_aligned_already_stays(tmp_path: Path) -> None:
    tensors = [{"location": "weights.bin", "offset": str(ALIGNMENT_BYTES), "length": "3"}]
    model_file, data = save(tmp_path, tensors, bytes(ALIGNMENT_BYTES) + b"abc")
    align_blobs(model_file, data)
    assert entries_of(model_file) == tensors
    assert data.read_bytes() == bytes(ALIGNMENT_BYTES) + b"abc"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": "2", "length": "9"}, "has 9 bytes at 2; expected them behind 0 and within 10"),
        ({"offset": "2"}, "external data of an unknown form: 'length'"),
        ({"offset": "0", "length": "1", "prepacked_0": "X|5"}, "unknown form: not enough values"),
        (
            {"offset": "0", "length": "4", "prepacked_0": "X|3;2;0"},
            "has 2 bytes at 3; expected them behind 4 and within 10",
        ),
    ],
)
def test_what_is_not_understood_is_refused(
    entries: dict[str, str], message: str, tmp_path: Path
) -> None:
    model_file, data = save(tmp_path, [{"location": "weights.bin"} | entries], bytes(10))
    with pytest.raises(SessionError, match=message):
        align_blobs(model_file, data)
    assert data.read_bytes() == bytes(10)

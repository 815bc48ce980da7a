import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from gemma_deploy.checkpoint_source import CheckpointSource
from gemma_deploy.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HASHES = {"config_sha256": "a" * 64, "headers_sha256": "b" * 64}


@pytest.fixture
def snapshot(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return what puts a checkpoint at a place below a folder."""

    def put(place: str) -> Path:
        folder = tmp_path / place
        shutil.copytree(tiny_checkpoint("gemma1"), folder)
        return folder

    return put


def test_a_snapshot_of_the_hub_has_its_name_and_commit(snapshot: Callable[[str], Path]) -> None:
    folder = snapshot(f"hub/models--google--gemma-2b/snapshots/{COMMIT}")
    link = folder.parents[3] / "link"
    link.symlink_to(folder)

    source = CheckpointSource.of(folder)

    assert (source.hub_id, source.commit) == ("google/gemma-2b", COMMIT)
    assert CheckpointSource.of(link) == source
    assert str(source) == f"google/gemma-2b, commit {COMMIT}"


@pytest.mark.parametrize(
    "place",
    [
        "gemma-2b",
        "models--google--gemma-2b/snapshots/main",
        f"models--google--gemma-2b/copies/{COMMIT}",
        f"datasets--google--gemma-2b/snapshots/{COMMIT}",
        f"models--gemma-2b/snapshots/{COMMIT}",
        f"models--go ogle--gemma-2b/snapshots/{COMMIT}",
    ],
)
def test_any_other_folder_has_hashes_only(place: str, snapshot: Callable[[str], Path]) -> None:
    folder = snapshot(place)
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config | {"_name_or_path": "google/gemma-7b"})
    (folder / "config.json").write_text(text)

    source = CheckpointSource.of(folder)

    assert (source.hub_id, source.commit) == (None, None)
    assert source.config_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert source.config_sha256[:12] in str(source)


def test_headers_tell_shapes_apart_whatever_the_weights(snapshot: Callable[[str], Path]) -> None:
    folder, other = snapshot("one"), snapshot("other")
    path = other / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    first = CheckpointSource.of(folder).headers_sha256
    assert first == hashlib.sha256(raw[8 : 8 + size]).hexdigest()

    path.write_bytes(raw[:-4] + b"abcd")
    assert CheckpointSource.of(other).headers_sha256 == first

    tensors = load_file(path)
    save_file(tensors | {"one_more": next(iter(tensors.values()))}, path)
    assert CheckpointSource.of(other).headers_sha256 != first


def test_reads_what_it_wrote() -> None:
    source = CheckpointSource(**HASHES, hub_id="google/gemma-2b", commit=COMMIT)

    assert CheckpointSource.from_dict(json.loads(json.dumps(source.to_dict()))) == source
    assert CheckpointSource.from_dict(None) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config_sha256", None),
        ("config_sha256", "a" * 63),
        ("headers_sha256", "B" * 64),
        ("hub_id", None),
        ("hub_id", "../../etc"),
        ("hub_id", 7),
        ("commit", None),
        ("commit", "main"),
        ("commit", f"{COMMIT}\n"),
    ],
)
def test_refuses_what_no_field_can_be(field: str, value: Any) -> None:
    raw = {**HASHES, "hub_id": "google/gemma-2b", "commit": COMMIT, field: value}

    with pytest.raises(ValueError, match=f"source.{field} is "):
        CheckpointSource.from_dict(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "source lacks config_sha256"),
        (
            {**HASHES, "path": "/home/me"},
            "source holds 'path', expected config_sha256, headers_sha2",
        ),
        ([1], r"source is \[1\], expected a JSON object"),
        ("google/gemma-2b", "source is 'google/gemma-2b', expected a JSON object"),
        ({**HASHES, "config_sha256": "a" * 10_000}, r"config_sha256 is 'a+… \(10,002 characters\)"),
    ],
)
def test_refuses_another_form(raw: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointSource.from_dict(raw)


def test_headers_without_an_end(snapshot: Callable[[str], Path]) -> None:
    folder = snapshot("one")
    with (folder / "model.safetensors").open("r+b") as file:
        file.write((1 << 62).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="cut off in its header"):
        CheckpointSource.of(folder)

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gemma_deploy.checkpoint import Checkpoint, expected_tensors
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import CheckpointError, ConfigError, GemmaDeployWarning

SAVED = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"

TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def folder(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> Path:
    """A copy of a tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint("gemma3"), tmp_path / "checkpoint"))


@pytest.fixture
def sharded(tiny_checkpoint: TinyCheckpoint, oracle: Callable[..., Any], tmp_path: Path) -> Path:
    target = tmp_path / "sharded"
    oracle(tiny_checkpoint("gemma1")).save_pretrained(target, max_shard_size="100KB")
    assert len(list(target.glob("*.safetensors"))) > 2
    return target


def read(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    info = checkpoint.tensors[name]
    array = np.empty(info.shape, np.float32)
    for start, stop in checkpoint.row_blocks(name, max_bytes=1000):
        checkpoint.read_rows(name, start, stop, array[start:stop].data)
    return array


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SAVED)
    change(tensors)
    save_file(tensors, folder / SAVED)


@pytest.mark.parametrize(
    "name", ["gemma1", "gemma1-mha-bias", "gemma1-untied", "gemma2", "gemma3", "gemma3-h256"]
)
def test_finds_every_tensor_where_safetensors_does(
    name: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(name))
    stored = load_file(checkpoint.folder / SAVED)
    assert set(checkpoint.tensors) == set(stored)
    for key, expected in stored.items():
        assert checkpoint.tensors[key].shape == tuple(expected.shape)
        assert np.array_equal(read(checkpoint, key), expected.numpy())


def test_reads_shards(sharded: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint, whole = Checkpoint.open(sharded), Checkpoint.open(tiny_checkpoint("gemma1"))
    assert checkpoint.tensors.keys() == whole.tensors.keys()
    assert len({info.file for info in checkpoint.tensors.values()}) > 2
    for key in whole.tensors:
        assert np.array_equal(read(checkpoint, key), read(whole, key))


def test_opens_a_path_given_as_text(folder: Path) -> None:
    assert Checkpoint.open(str(folder)).config == GemmaConfig.from_file(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_reads_half_precision_as_stored(dtype: str, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gemma1", dtype))
    info = checkpoint.tensors[UP_PROJ]
    assert info.dtype == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    buffer = bytearray(3 * info.row_bytes)
    checkpoint.read_rows(UP_PROJ, 5, 8, memoryview(buffer))
    stored = load_file(checkpoint.folder / SAVED)[UP_PROJ][5:8]
    assert bytes(buffer) == stored.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("max_bytes", "rows"), [(256, 1), (1, 1), (600, 2), (10**9, 128)])
def test_row_blocks_cover_every_row_once(folder: Path, max_bytes: int, rows: int) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.tensors[UP_PROJ].shape == (128, 64)
    blocks = list(checkpoint.row_blocks(UP_PROJ, max_bytes))
    assert [row for block in blocks for row in range(*block)] == list(range(128))
    assert {stop - start for start, stop in blocks} == {rows}


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (-1, 0), (127, 130), (3, 2)])
def test_a_buffer_of_another_size_is_a_programming_error(
    folder: Path, start: int, stop: int
) -> None:
    buffer = memoryview(bytearray(256))
    with pytest.raises(ValueError, match="the buffer has 256"):
        Checkpoint.open(folder).read_rows(UP_PROJ, start, stop, buffer)


@pytest.mark.parametrize(
    "prefixes",
    [
        ("model.language_model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("language_model.", "lm_head."),
        ("", "lm_head."),
    ],
    ids=["gemma3-new", "gemma3-hub", "gemma3-base", "text-base"],
)
def test_strips_the_prefixes_of_wrappers(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, prefixes: tuple[str, str]
) -> None:
    source = tiny_checkpoint("gemma1-untied")
    shutil.copy(source / "config.json", tmp_path)
    body, head = prefixes
    tensors = {
        body + k.removeprefix("model.") if k.startswith("model.") else head + "weight": v
        for k, v in load_file(source / SAVED).items()
    }
    # A vision tower's names also hold "model." and ".layers.".
    tensors["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = torch.zeros(2)
    tensors["model.multi_modal_projector.mm_soft_emb_norm.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / SAVED)
    opened, expected = Checkpoint.open(tmp_path), Checkpoint.open(source)
    assert opened.tensors.keys() == expected.tensors.keys()
    for key in expected.tensors:
        assert np.array_equal(read(opened, key), read(expected, key))


def test_reads_a_multimodal_checkpoint_of_transformers(tmp_path: Path) -> None:
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    language_model = model.model.language_model.state_dict()
    assert {f"model.{k}" for k in language_model} == set(checkpoint.tensors)
    for key, expected in language_model.items():
        assert np.array_equal(read(checkpoint, f"model.{key}"), expected.numpy())


def test_ignores_a_redundant_head(folder: Path) -> None:
    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(folder, store_head)
    assert "lm_head.weight" not in Checkpoint.open(folder).tensors


@pytest.mark.parametrize("name", ["gemma1-mha-bias", "gemma1-untied", "gemma2", "gemma3"])
def test_expects_the_tensors_that_transformers_writes(
    name: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    folder = tiny_checkpoint(name)
    with safe_open(folder / SAVED, "pt") as stored:
        shapes = {k: tuple(stored.get_slice(k).get_shape()) for k in stored.keys()}  # noqa: SIM118  # not a mapping
    assert expected_tensors(GemmaConfig.from_file(folder)) == shapes


def test_refuses_a_missing_file(folder: Path) -> None:
    (folder / SAVED).unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor .*index"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt", "gemma.ckpt"])
def test_refuses_pickle_and_says_why(folder: Path, name: str) -> None:
    (folder / SAVED).rename(folder / name)
    with pytest.raises(CheckpointError, match=rf"pickle \({name}\), which runs arbitrary code"):
        Checkpoint.open(folder)


def test_refuses_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json not found"):
        Checkpoint.open(folder)


def test_refuses_a_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(UP_PROJ))  # type: ignore[arg-type]  # the popped tensor is of no use
    with pytest.raises(CheckpointError, match=rf"lacks the tensor {UP_PROJ} \[128, 64\]"):
        Checkpoint.open(folder)


def test_refuses_a_wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({UP_PROJ: tensors[UP_PROJ].T.contiguous()}))
    with pytest.raises(CheckpointError, match=r"has shape \[64, 128\], expected \[128, 64\]"):
        Checkpoint.open(folder)


def test_refuses_a_wrong_dtype(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({UP_PROJ: tensors[UP_PROJ].to(torch.int8)}))
    with pytest.raises(CheckpointError, match="has dtype I8, expected F32, F16, BF16"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("remaining", [0, 7, 100])
def test_refuses_a_file_cut_in_its_header(folder: Path, remaining: int) -> None:
    data = (folder / SAVED).read_bytes()
    (folder / SAVED).write_bytes(data[:remaining])
    with pytest.raises(CheckpointError, match="cut off in its header"):
        Checkpoint.open(folder)


def test_refuses_a_truncated_file(folder: Path) -> None:
    data = (folder / SAVED).read_bytes()
    (folder / SAVED).write_bytes(data[:-1])
    expected = rf"is truncated: {len(data) - 1} bytes, expected {len(data)} by its header"
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"x": {"dtype": "F32", "shape": "a", "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [0, 1, 1, 1, 1, 1, 1, 1, 1], "data_offsets": [0, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [0, 1099511627777], "data_offsets": [0, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, Infinity]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "y": {"data_offsets": [0, 4]}}',
    ],
)
def test_refuses_a_broken_header(folder: Path, header: bytes) -> None:
    (folder / SAVED).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match="safetensors header"):
        Checkpoint.open(folder)


def test_refuses_offsets_that_contradict_the_shape(folder: Path) -> None:
    data = (folder / SAVED).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header[UP_PROJ]["dtype"] = "F16"
    changed = json.dumps(header).encode()
    body = data[8 + size :]
    (folder / SAVED).write_bytes(struct.pack("<Q", len(changed)) + changed + body)
    with pytest.raises(CheckpointError, match="takes 32768 bytes, expected 16384 for F16"):
        Checkpoint.open(folder)


def test_refuses_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} is missing, yet {INDEX}"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x"]
)
def test_refuses_an_index_that_leaves_the_folder(sharded: Path, name: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="outside the checkpoint's folder: refused"):
        Checkpoint.open(sharded)


def test_refuses_an_index_of_pickles(sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "a.bin"}}))
    with pytest.raises(CheckpointError, match="Pickle runs arbitrary code"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_refuses_a_broken_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{INDEX}.*download it again"):
        Checkpoint.open(sharded)


def test_refuses_a_tensor_stored_twice(folder: Path) -> None:
    def store_twice(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.norm.weight"] = tensors["model.norm.weight"].clone()

    rewrite(folder, store_twice)
    with pytest.raises(CheckpointError, match="is there a second time"):
        Checkpoint.open(folder)


def test_a_file_that_shrinks_after_opening_is_an_error(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    info = checkpoint.tensors[UP_PROJ]
    (folder / SAVED).write_bytes((folder / SAVED).read_bytes()[: info.offset + 10])
    with pytest.raises(CheckpointError, match="ends 246 bytes early"):
        checkpoint.read_rows(UP_PROJ, 0, 1, memoryview(bytearray(256)))


def test_reads_shards_without_an_index(
    sharded: Path, tiny_checkpoint: TinyCheckpoint, folder: Path
) -> None:
    (sharded / INDEX).unlink()
    whole = Checkpoint.open(tiny_checkpoint("gemma1"))
    assert Checkpoint.open(sharded).tensors.keys() == whole.tensors.keys()
    (folder / SAVED).rename(folder / "model-00001-of-00001.safetensors")
    assert Checkpoint.open(folder).tensors


def test_refuses_a_part_of_the_shards_without_an_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    count = len(list(sharded.glob("*.safetensors")))
    min(sharded.glob("*.safetensors")).unlink()
    message = rf"shards without {INDEX}, and not one whole set .*\({count - 1} of {count}\)"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(sharded)


def test_names_other_weights_that_it_found(folder: Path) -> None:
    (folder / SAVED).rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"found weights\.safetensors: is one of them"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_widens_rows_to_float32(dtype: str, tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gemma1", dtype))
    stored = load_file(checkpoint.folder / SAVED)[UP_PROJ][5:9].float().numpy()
    assert np.array_equal(checkpoint.float_rows(UP_PROJ, 5, 9), stored)


def test_says_what_it_does_not_read(sharded: Path, folder: Path) -> None:
    stale = "model-00009-of-00009.safetensors"
    shutil.copy(folder / SAVED, sharded / stale)
    with pytest.warns(GemmaDeployWarning, match=f"also holds {stale}, which is not read"):
        Checkpoint.open(sharded)

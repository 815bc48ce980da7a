import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gemma_deploy.errors import CheckpointError, GemmaDeployWarning, RequestError
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.tokenizer import GemmaTokenizer


def write_checkpoint(folder: Path, generation: Any = None) -> Path:
    config = {"model_type": "gemma", "eos_token_id": 1, "max_position_embeddings": 99}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_bundle_and_checkpoint_say_the_same(text_bundle: Any, text_checkpoint: Any) -> None:
    bundle = ModelSource.open(text_bundle("gemma2"))
    checkpoint = ModelSource.open(text_checkpoint("gemma2"))
    assert bundle.bundle is not None
    assert checkpoint.bundle is None
    for name in ("config", "generation_config", "max_seq_len", "eos_token_ids"):
        assert getattr(bundle, name) == getattr(checkpoint, name)
    assert bundle.eos_token_ids == {1, 7}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, {1}),
        ({}, {1}),
        ({"eos_token_id": None}, {1}),
        ({"eos_token_id": 106}, {1, 106}),
        ({"eos_token_id": [1, 106]}, {1, 106}),
    ],
)
def test_every_end_of_text_counts(tmp_path: Path, generation: Any, expected: set[int]) -> None:
    source = ModelSource.open(write_checkpoint(tmp_path, generation))
    assert source.eos_token_ids == expected
    assert source.max_seq_len == 99


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read as JSON"), ("[1]", "holds a list, expected")]
)
def test_a_broken_generation_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        ModelSource.open(tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    message = r"has no config\.json; .*Expected a checkpoint .*; or a bundle, the folder that"
    with pytest.raises(RequestError, match=message):
        ModelSource.open(tmp_path)
    with pytest.raises(RequestError, match="does not exist; expected the folder of a bundle"):
        ModelSource.open(tmp_path / "missing")


def test_a_file_is_named_as_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(
        RequestError, match=r"config\.json is a file; give the folder that it lies in"
    ):
        ModelSource.open(tmp_path / "config.json")


def test_gguf_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "gemma.gguf"
    file.write_bytes(b"GGUF")
    for path in (tmp_path, file):
        with pytest.raises(
            RequestError, match=r"holds weights (only )?as GGUF .*: not read\. Give"
        ):
            ModelSource.open(path)


def test_an_adapter_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "google/gemma-2b"}')
    with pytest.raises(RequestError, match=r"is an adapter of google/gemma-2b .*merge it"):
        ModelSource.open(tmp_path)


def test_the_config_that_tensors_have_counts_where_both_are_asked_for(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint("gemma1"), tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, folder / "model.safetensors")
    source = ModelSource.open(folder)
    assert source.config.tie_word_embeddings
    with pytest.warns(GemmaDeployWarning, match="that is the head"):
        assert not source.stored_config().tie_word_embeddings


@pytest.mark.parametrize(
    "path",
    ["./google/gemma", "../google/gemma", "/google/gemma", "build/gemma", "here/gemma", "a/b/c"],
)
def test_a_mistyped_path_is_no_hub_id(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(RequestError, match=r"expected the folder of a bundle or of a checkpoint$"):
        ModelSource.open(path)


def test_a_hub_id_is_told_from_a_missing_folder() -> None:
    message = (
        "google/gemma-2b does not exist.*`gemma-deploy export google/gemma-2b --output BUNDLE`"
    )
    with pytest.raises(RequestError, match=message):
        ModelSource.open(Path("google/gemma-2b"))


def test_a_packed_engine_says_what_its_bundle_says(packed_engine: Path, engine_bundle: Any) -> None:
    packed, bundle = ModelSource.open(packed_engine), ModelSource.open(engine_bundle.folder)
    assert packed.engine is not None
    assert packed.bundle is None
    for name in ("config", "generation_config", "eos_token_ids"):
        assert getattr(packed, name) == getattr(bundle, name)
    assert packed.max_seq_len == 96  # the engine's, where the bundle says what the model can
    text = "The for statement"
    ids = [GemmaTokenizer.from_pretrained(s.folder).encode(text) for s in (packed, bundle)]
    assert ids[0] == ids[1]


def test_an_engine_that_was_not_packed_is_refused(engine_bundle: Any) -> None:
    (folder,) = (engine_bundle.folder / "engines").iterdir()
    with pytest.raises(
        RequestError,
        match=f"give the bundle it is in, {engine_bundle.folder} with --backend tensorrt",
    ):
        ModelSource.open(folder)

"""Which head a checkpoint has, against transformers: the tensors decide, the config only proposes."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError, GemmaDeployWarning
from gemma_deploy.model import GemmaForCausalLM
from tests.rounding import MODEL_FLOAT32, assert_near

SAVED = "model.safetensors"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14}


@pytest.fixture(params=["gemma1", "gemma2", "gemma3"])
def folder(
    request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> Path:
    """A copy of a tiny tied checkpoint."""
    return Path(shutil.copytree(tiny_checkpoint(request.param), tmp_path / "checkpoint"))


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def store(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SAVED)
    change(tensors)
    save_file(tensors, folder / SAVED, metadata={"format": "pt"})


def another_head(tensors: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(1)
    tensors[HEAD] = torch.randn_like(tensors[TABLE])


@torch.no_grad()
def assert_logits_are_those_of_transformers(folder: Path) -> None:
    ids = torch.arange(3, 40)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )(ids).logits
    ours = GemmaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )(ids).logits
    assert_near(ours, theirs, roundings=MODEL_FLOAT32)


def test_a_head_of_its_own_is_the_head_whatever_the_config_says(folder: Path) -> None:
    store(folder, another_head)
    with pytest.warns(GemmaDeployWarning, match="lm_head.weight is stored that differs"):
        checkpoint = Checkpoint.open(folder)
    assert not checkpoint.config.tie_word_embeddings
    assert HEAD in checkpoint.tensors
    with pytest.warns(GemmaDeployWarning):
        assert_logits_are_those_of_transformers(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_equal_head_is_left_out_in_whatever_dtype(folder: Path, dtype: torch.dtype) -> None:
    def equal_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors[TABLE] = tensors[TABLE].bfloat16().half().float()  # held by each of the dtypes
        tensors[HEAD] = tensors[TABLE].to(dtype, copy=True)

    store(folder, equal_head)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.tie_word_embeddings
    assert HEAD not in checkpoint.tensors
    assert checkpoint.unused == {"of a head that is equal to the embedding": (HEAD,)}
    assert_logits_are_those_of_transformers(folder)


@pytest.mark.parametrize("row", [0, 300, -1])
def test_one_weight_makes_a_head_another_one(folder: Path, row: int) -> None:
    def nearly_equal_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[TABLE].clone()
        tensors[HEAD][row, -1] += 1e-3

    store(folder, nearly_equal_head)
    with pytest.warns(GemmaDeployWarning, match="differs"):
        assert HEAD in Checkpoint.open(folder).tensors


def test_a_tied_table_may_be_stored_as_the_head(folder: Path) -> None:
    store(folder, lambda tensors: tensors.update({HEAD: tensors.pop(TABLE)}))
    assert Checkpoint.open(folder).tensors[TABLE].stored_name == HEAD
    assert_logits_are_those_of_transformers(folder)


def test_a_head_of_another_shape_is_refused(folder: Path) -> None:
    store(folder, lambda tensors: tensors.update({HEAD: torch.ones(513, 64)}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight .* has shape \[513, 64\], expected"):
        Checkpoint.open(folder)


def test_a_missing_head_is_refused_where_transformers_would_draw_one(folder: Path) -> None:
    set_config(folder, tie_word_embeddings=False)
    message = "lacks lm_head.weight, .*transformers would draw a random head"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize("is_stored", [False, True], ids=["no head", "own head"])
@pytest.mark.parametrize("in_text", [None, True, False])
@pytest.mark.parametrize("in_outer", [None, True, False])
def test_a_multimodal_checkpoint_has_the_head_that_transformers_finds(
    in_outer: bool | None, in_text: bool | None, is_stored: bool, tmp_path: Path
) -> None:
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, tie_word_embeddings=not is_stored
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for part, value in ((raw, in_outer), (raw["text_config"], in_text)):
        part.pop("tie_word_embeddings")
        if value is not None:
            part["tie_word_embeddings"] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    if in_outer is False and not is_stored:
        with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
            Checkpoint.open(tmp_path)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GemmaDeployWarning)
        assert_logits_are_those_of_transformers(tmp_path)
        checkpoint = Checkpoint.open(tmp_path)
    assert (HEAD in checkpoint.tensors) == is_stored
    kinds = {kind: len(names) for kind, names in checkpoint.unused.items()}
    stored = load_file(tmp_path / SAVED)
    assert kinds == {
        "of vision and audio towers and projectors": len(stored) - len(checkpoint.tensors)
    }

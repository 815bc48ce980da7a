from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from gemma_deploy.errors import CheckpointError
from gemma_deploy.model import GemmaForCausalLM, saving
from tests.rounding import MODEL_FLOAT32, assert_near

NAMES = ["gemma1", "gemma1-mha-bias", "gemma1-untied", "gemma2", "gemma3"]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_and_we_read_it_back(
    name: str,
    tiny_checkpoint: Callable[..., Path],
    random_tokens: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    ids, target = random_tokens(1, 20), tmp_path / "new" / "folder"
    model = GemmaForCausalLM.from_pretrained(tiny_checkpoint(name), attn_implementation="eager")
    model.save_pretrained(target)
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
    again = GemmaForCausalLM.from_pretrained(target, attn_implementation="eager")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(
        target, attn_implementation="eager"
    )
    assert theirs.dtype == torch.float32
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected)
        assert_near(theirs(ids).logits, expected, roundings=MODEL_FLOAT32)


def test_a_tied_head_is_stored_once_in_its_dtype(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = GemmaForCausalLM.from_pretrained(tiny_checkpoint("gemma1"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    size_bytes = sum(2 * p.numel() for p in model.parameters())
    stored_bytes = (tmp_path / "model.safetensors").stat().st_size
    assert size_bytes < stored_bytes < size_bytes + 10_000
    assert GemmaForCausalLM.from_pretrained(tmp_path).lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("error", [OSError("disk full"), SafetensorError("disk full")])
def test_a_failure_leaves_what_was_there(
    error: Exception,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = GemmaForCausalLM.from_pretrained(tiny_checkpoint("gemma1"))
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(_tensors: object, path: Path, **_options: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(saving, "save_file", fail)
    with pytest.raises(CheckpointError, match="cannot be written: disk full"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

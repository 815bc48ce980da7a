import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.config import GemmaConfig
from gemma_deploy.model import GemmaForCausalLM, GemmaModel
from gemma_deploy.model.loading import load_parameters, stored_dtype

# VmHWM, not ru_maxrss: a child process inherits its parent's ru_maxrss.
MEASURE = """
import re, sys, torch
from pathlib import Path
from gemma_deploy.model import GemmaForCausalLM

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak_kib()
model = GemmaForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(peak_kib() - before)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_parameters_equal_transformers(
    stored: str,
    dtype: torch.dtype,
    tiny_checkpoint: Callable[..., Path],
    oracle: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_checkpoint("gemma1-untied", stored)
    row_blocks = Checkpoint.row_blocks
    # Blocks of a few rows, so that matrices take several.
    monkeypatch.setattr(Checkpoint, "row_blocks", lambda self, name: row_blocks(self, name, 700))
    model = GemmaForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = oracle(folder, dtype=str(dtype).removeprefix("torch.")).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[key]), key


def test_stored_dtype(tiny_checkpoint: Callable[..., Path]) -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert stored_dtype(Checkpoint.open(tiny_checkpoint("gemma1", name))) == dtype


def test_parameters_are_trainable_and_tied_ones_stay_one(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gemma1"))
    with torch.device("meta"):
        model = GemmaForCausalLM(checkpoint.config)
    load_parameters(model, checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_there_is_no_second_copy_of_the_model(tmp_path: Path, dtype: str) -> None:
    config = GemmaConfig(
        vocab_size=100_000,
        hidden_size=768,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = GemmaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    num_parameters = sum(p.numel() for p in model.parameters())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    size_bytes = num_parameters * (2 if dtype == "bfloat16" else 4)
    # A block of 64 MiB and its successor where rows are cast; a copy is 147 or 293 MiB.
    staging_bytes = (16 if dtype == "bfloat16" else 128) * 1024 * 1024
    assert int(done.stdout) * 1024 < size_bytes + staging_bytes


def test_the_decoder_alone(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("gemma1")
    expected = GemmaForCausalLM.from_pretrained(folder).model.state_dict()
    found = GemmaModel.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

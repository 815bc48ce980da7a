"""Random checkpoints are ones that the exporter and transformers read."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GemmaForCausalLM

from benchmarks.random_tokenizer import write_tokenizer
from benchmarks.shapes import shape_config, write_random_checkpoint
from gemma_deploy.tokenizer import GemmaTokenizer

SMALL = dataclasses.replace(
    shape_config("g270m"),
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    layer_types=(),
)


def test_transformers_reads_a_random_checkpoint(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, SMALL)
    write_tokenizer(tmp_path, SMALL.vocab_size)
    gemma: Any = GemmaForCausalLM  # transformers' annotations leave out output_loading_info
    model, info = gemma.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weight = model.model.layers[1].mlp.gate_proj.weight.float()
    assert weight.shape == (96, 64)
    assert abs(weight.std().item() - 0.02) < 1e-3
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 2048
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "GemmaForCausalLM"
    ]


def test_no_two_blocks_are_equal(tmp_path: Path) -> None:
    # Two blocks of 16 MB, so that the second begins in the middle of the embedding.
    config = dataclasses.replace(SMALL, vocab_size=256_000)
    write_random_checkpoint(tmp_path, config)
    data = np.fromfile(tmp_path / "model.safetensors", np.uint8)
    body = data[8 + int.from_bytes(data[:8].tobytes(), "little") :]
    assert not np.array_equal(body[: 1 << 20], body[16 << 20 : 17 << 20])


def test_a_tokenizer_of_any_size_uses_its_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 5000)
    tokenizer = GemmaTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == 5000
    joined = [tokenizer.encode(tokenizer.id_to_token(x), add_bos=False) for x in range(2048, 5000)]
    assert sum(ids == [x] for x, ids in enumerate(joined, 2048)) > 0.9 * len(joined)
    first = (tmp_path / "tokenizer.json").read_bytes()
    write_tokenizer(tmp_path, 5000)
    assert (tmp_path / "tokenizer.json").read_bytes() == first

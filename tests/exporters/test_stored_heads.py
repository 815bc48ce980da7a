"""A head that is stored beside a tied embedding reaches the graphs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemma_deploy.bundle import Bundle
from gemma_deploy.errors import GemmaDeployWarning
from gemma_deploy.exporters.export import export_checkpoint
from tests.rounding import MODEL_FLOAT32, assert_near

SAVED = "model.safetensors"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def checkpoint(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny Gemma 2, tied by its config, with another head stored."""
    folder = tmp_path_factory.mktemp("heads") / "checkpoint"
    shutil.copytree(tiny_checkpoint("gemma2"), folder)
    tensors = load_file(folder / SAVED)
    torch.manual_seed(0)
    tensors[HEAD] = torch.randn_like(tensors[TABLE]) * tensors[TABLE].std()
    save_file(tensors, folder / SAVED, metadata={"format": "pt"})
    return folder


def test_logits_are_those_of_the_stored_head(
    checkpoint: Path, tmp_path: Path, open_graph: Callable[..., Any]
) -> None:
    with pytest.warns(GemmaDeployWarning, match="that is the head"):
        bundle = export_checkpoint(checkpoint, tmp_path / "bundle")

    assert not Bundle.open(bundle.folder).config.tie_word_embeddings
    graph = open_graph(bundle.folder, "prefill")
    ids = np.arange(3, 33)[None]
    logits, _ = graph.run(ids, [0], graph.new_cache(1, 64), np.arange(30)[None])
    with torch.no_grad():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        )(torch.tensor(ids)).logits.numpy()
    assert_near(logits, wanted, roundings=MODEL_FLOAT32)

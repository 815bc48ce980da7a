from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import CheckpointError
from gemma_deploy.exporters.calibration.layer_walk import LayerWalk
from tests.rounding import MODEL_FLOAT32, assert_near

TinyFolders = Callable[..., Path]


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(0, 512, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["gemma1-mha-bias", "gemma2", "gemma3"])
def test_hidden_states_are_those_of_transformers(
    tiny_checkpoint: TinyFolders,
    oracle: Callable[..., Any],
    rows: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Longer than the sliding windows of 8, and two rows at a time."""
    monkeypatch.setattr(
        "gemma_deploy.exporters.calibration.layer_walk._STEP_BYTES", 2 * 24 * 128 * 4
    )
    with torch.no_grad():
        states = oracle(tiny_checkpoint(name))(rows, output_hidden_states=True).hidden_states
    walk = LayerWalk(Checkpoint.open(tiny_checkpoint(name)), rows)
    for index in range(walk.config.num_hidden_layers):
        assert_near(walk.hidden, states[index], roundings=MODEL_FLOAT32)
        walk.advance(walk.layer(index))
    assert_near(walk.last_norm()(walk.hidden), states[-1], roundings=MODEL_FLOAT32)


def test_a_stream_of_ones_own_leaves_the_other_alone(
    tiny_checkpoint: TinyFolders, rows: torch.Tensor
) -> None:
    walk = LayerWalk(Checkpoint.open(tiny_checkpoint("gemma2")), rows)
    before, own = walk.hidden.clone(), walk.hidden.clone()
    walk.advance(walk.layer(0), own)
    assert torch.equal(walk.hidden, before)
    walk.advance(walk.layer(0))
    assert torch.equal(walk.hidden, own)


@pytest.mark.parametrize("tensor", ["layers.1.mlp.up_proj", "embed_tokens", "norm"])
def test_weights_that_are_not_finite_are_named(
    tiny_checkpoint: TinyFolders, tmp_path: Path, rows: torch.Tensor, tensor: str
) -> None:
    source = tiny_checkpoint("gemma2")
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.{tensor}.weight"][..., 3] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(CheckpointError, match=rf"model\.{tensor}\.weight holds NaN or infinity"):
        read_all(tmp_path, rows)


def read_all(checkpoint: Path, rows: torch.Tensor) -> None:
    walk = LayerWalk(Checkpoint.open(checkpoint), rows)
    walk.layer(1)
    walk.last_norm()

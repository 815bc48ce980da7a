from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import apply_rotary_pos_emb

from gemma_deploy.config import GemmaConfig, LayerType
from gemma_deploy.model.rotary import RotaryEmbedding, apply_rotary
from tests.rounding import assert_near

FULL: LayerType = "full_attention"


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_angles_equal_transformers(
    name: str, tiny_checkpoint: Callable[..., Path], oracle: Callable[..., Any]
) -> None:
    folder = tiny_checkpoint(name)
    config = GemmaConfig.from_file(folder)
    positions = torch.tensor([[0, 1, 7, 500], [3, 8191, 100_000, 2]])
    for layer_type in config.rope_parameters:
        extra = (layer_type,) if name == "gemma3" else ()
        theirs = oracle(folder).model.rotary_emb(torch.zeros(1), positions, *extra)
        for ours, expected in zip(
            RotaryEmbedding(config)(positions, layer_type), theirs, strict=True
        ):
            assert ours.dtype == torch.float32
            assert torch.equal(torch.cat((ours, ours), -1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotation_equals_transformers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 16, generator=generator).to(dtype)
    angles = torch.rand(2, 5, 8, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    full = [torch.cat((t, t), -1).to(dtype) for t in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(x, x, *full, unsqueeze_dim=2)
    actual = apply_rotary(x, cos, sin)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


def test_scores_depend_on_distance_alone() -> None:
    rotary = RotaryEmbedding(GemmaConfig(head_dim=32))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 32, generator=generator)
    scores = []
    for start in (0, 5, 90):
        turned = [
            apply_rotary(x, *rotary(torch.tensor([[position]]), FULL))
            for x, position in ((query, start + 11), (key, start))
        ]
        scores.append((turned[0] * turned[1]).sum())
    # An angle of 101 is off by as many roundings of 1, in query and key; 32 products are summed.
    assert_near(torch.stack(scores), scores[0].expand(3), roundings=2 * 101 + 32)


def test_has_nothing_to_load_or_move() -> None:
    rotary = RotaryEmbedding(GemmaConfig())
    assert not list(rotary.parameters())
    assert not list(rotary.buffers())
    assert FULL in get_args(LayerType)

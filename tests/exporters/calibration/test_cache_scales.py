"""Scales of an int8 cache against transformers' own keys and values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.exporters.calibration.cache_scales import HEADROOM, measured_cache_scales
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.graph_spec import cache_scale_names

Checkpoints = Callable[[str], Path]


def cached(model: Any, tokens: Tensor, first: int) -> list[tuple[Tensor, Tensor]]:
    """Return rotated keys and values [B, K, S, H] of each layer, the first token at a position."""
    cache: Any = transformers.DynamicCache()
    positions = torch.arange(first, first + tokens.shape[1])[None]
    with torch.no_grad():
        model(tokens, past_key_values=cache, position_ids=positions)
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("name", ["gemma1-mha-bias", "gemma1-h256", "gemma2", "gemma3"])
def test_no_position_reaches_beyond_the_scales(
    name: str,
    tiny_checkpoint: Checkpoints,
    oracle: Callable[..., Any],
    random_tokens: Callable[..., Tensor],
) -> None:
    """Measured at the first positions, they hold wherever the text lies, without being too wide."""
    source, tokens = tiny_checkpoint(name), random_tokens(4, 12)
    scales = measured_cache_scales(Checkpoint.open(source), tokens)
    model = oracle(source)
    at_most = {name: torch.zeros_like(scale) for name, scale in scales.items()}
    for first in (0, 5, 17, 60, 99):
        for layer, rows in enumerate(cached(model, tokens, first)):
            for name_, row in zip(cache_scale_names(layer), rows, strict=True):
                peaks = row.abs().amax(dim=(0, 2))
                at_most[name_] = torch.maximum(at_most[name_], peaks)
    for name_, peaks in at_most.items():
        share = peaks / (scales[name_] * 127 / HEADROOM)
        assert float(share.max()) < 1 + 1e-4
        # Values are met exactly; a key's pair turns into its channels at some position or other.
        least = 1 - 1e-4 if "value" in name_ else 0.5
        assert float(share.median()) > least


def test_channels_that_a_text_does_not_use_are_not_divided_by_zero(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_checkpoint("gemma1")
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][3] = 0
    tensors["model.layers.1.self_attn.v_proj.weight"][:] = 0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    scales = measured_cache_scales(Checkpoint.open(tmp_path), torch.tensor([[9, 10, 11]]))
    first, second = (scales[cache_scale_names(layer)[1]] for layer in (0, 1))
    assert float(first.flatten()[3]) == pytest.approx(float(first.max()) / 127)
    assert bool(torch.isfinite(1 / first).all())
    assert bool((second > 0).all())


def test_float16_bundles_with_divided_values(
    inflated_checkpoint: Checkpoints,
    oracle: Callable[..., Any],
    random_tokens: Callable[..., Tensor],
    open_graph: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Values are stored divided by a power of two, and so must their scales be."""
    source, folder = inflated_checkpoint("gemma3"), tmp_path / "bundle"
    bundle = export_checkpoint(
        source, folder, dtype="float16", cache_dtype="int8", graphs=["onnxruntime"]
    )
    assert bundle.manifest.scaling is not None
    assert any(layer.value > 1 for layer in bundle.manifest.scaling.layers)
    tokens, graph = random_tokens(2, 24), open_graph(folder, "prefill")
    positions = np.tile(np.arange(24), (2, 1))
    logits, _ = graph.run(tokens, [0, 0], graph.new_cache(2, 24), positions)
    with torch.no_grad():
        wanted = oracle(source)(tokens).logits
    difference = (torch.as_tensor(logits) - wanted).abs().mean()
    # Scales that were not divided would leave a fraction of the codes, and three times as much.
    assert float(difference) < 0.06 * float(wanted.std())

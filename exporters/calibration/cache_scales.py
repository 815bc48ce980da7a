"""Scales of an int8 KV cache, measured on a text: `measured_cache_scales`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.exporters.calibration.layer_walk import LayerWalk
from gemma_deploy.graph_spec import cache_scale_names
from gemma_deploy.model.attention import GemmaAttention

HEADROOM: Final = 2.0
"""Another text may reach higher than the measured one, and what lies beyond is cut off: on
samples/tiny-gemma 1 costs nine times the KL of 2, which costs half as much again as the best, 1.5."""

_LARGEST_CODE = 127

OnProgress = Callable[[str, int, int], object]


def measured_cache_scales(
    checkpoint: Checkpoint, token_rows: Tensor, on_progress: OnProgress = lambda *_: None
) -> dict[str, Tensor]:
    """Run a checkpoint on a text in float32, layer by layer, and scale each channel by its peak.

    Rotation mixes channels i and i + H/2 of a key, by angles that grow with the position: both are
    scaled by the largest length of their pair, which no position exceeds.

    Args:
        checkpoint: The model.
        token_rows: int64 [R, S], as from `text.token_rows`.
        on_progress: Called with a stage, how much of it is done, and of how much.

    Returns:
        What a code of 1 stands for in each channel, float32 [K, H], by `cache_scale_names`.

    Raises:
        CheckpointError: The weights cannot be read, or one is not finite.
    """
    stage, num_layers = "measuring keys and values", checkpoint.config.num_hidden_layers
    walk = LayerWalk(checkpoint, token_rows)
    scales = {}
    for index in range(num_layers):
        on_progress(stage, index, num_layers)
        layer = walk.layer(index)
        with _peaks(layer.self_attn) as (keys, values):
            walk.advance(layer)
        key_name, value_name = cache_scale_names(index)
        scales[key_name], scales[value_name] = _scale(keys), _scale(values)
        # Before the next one is read: two at a time would be the peak of memory.
        del layer
    on_progress(stage, num_layers, num_layers)
    return scales


@contextmanager
def _peaks(attention: GemmaAttention) -> Iterator[tuple[Tensor, Tensor]]:
    """Collect the largest keys and values, [K, H] each, that are computed inside the block."""
    shape = (attention.num_kv_heads, attention.head_dim)
    keys, values = torch.zeros(shape), torch.zeros(shape)

    def see_keys(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        first, second = output.reshape(-1, *shape).chunk(2, dim=-1)
        pairs = torch.hypot(first, second).amax(dim=0)
        torch.maximum(keys, torch.cat((pairs, pairs), dim=-1), out=keys)

    def see_values(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        torch.maximum(values, output.reshape(-1, *shape).abs().amax(dim=0), out=values)

    last_of_key = attention.k_proj if attention.k_norm is None else attention.k_norm
    handles = [
        last_of_key.register_forward_hook(see_keys),
        attention.v_proj.register_forward_hook(see_values),
    ]
    try:
        yield keys, values
    finally:
        for handle in handles:
            handle.remove()


def _scale(peaks: Tensor) -> Tensor:
    # A channel that was never used may be by another text: it is not divided by zero.
    smallest = torch.finfo(torch.float32).tiny
    least = max(float(peaks.max()) / _LARGEST_CODE, smallest)
    return peaks.clamp(min=least) * (HEADROOM / _LARGEST_CODE)

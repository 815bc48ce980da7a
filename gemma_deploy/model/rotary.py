"""Rotary position embedding in half-split layout.

Su et al., RoFormer, https://arxiv.org/abs/2104.09864. Angles are computed in float32 for the
positions asked for; there are no tables to size, move or export.
"""

import torch
from torch import Tensor, nn

from gemma_deploy.config import GemmaConfig, LayerType, RopeParameters


class RotaryEmbedding(nn.Module):
    """Cosines and sines for each layer type; it has no parameters and no buffers."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rope_parameters = config.rope_parameters

    def forward(self, position_ids: Tensor, layer_type: LayerType) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), float32 [B, S, H/2], for integer positions [B, S]."""
        rope = self.rope_parameters[layer_type]
        frequencies = inverse_frequencies(rope, self.head_dim, position_ids.device)
        angles = position_ids[..., None].float() * frequencies  # [B, S, H/2]
        return angles.cos(), angles.sin()


def inverse_frequencies(rope: RopeParameters, head_dim: int, device: torch.device) -> Tensor:
    """Return radians per position of each of the H/2 planes, float32 [H/2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    # `factor` is 1 for the default type; linear scaling divides positions, thus frequencies.
    return 1.0 / (rope.rope_theta**exponents) / rope.factor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, S, heads, H] by angles whose cos and sin are [B, S, H/2], in the dtype of x.

    Dimension i is paired with i + H/2 (half-split), not with its neighbour.
    """
    cos, sin = cos.to(x.dtype)[:, :, None], sin.to(x.dtype)[:, :, None]  # [B, S, 1, H/2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

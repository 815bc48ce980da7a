"""The gated feed-forward block: `GemmaFeedForward` (GeGLU, https://arxiv.org/abs/2002.05202)."""

from torch import Tensor, nn
from torch.nn import functional as F

from gemma_deploy.config import GemmaConfig


class GemmaFeedForward(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        gate = F.gelu(self.gate_proj(hidden), approximate="tanh")  # [B, S, F]
        output: Tensor = self.down_proj(gate * self.up_proj(hidden))
        return output

"""Root-mean-square normalization in Gemma's form: `RMSNorm`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Scale vectors to unit root mean square, times (1 + weight), in float32.

    The product with (1 + weight) is taken before the result is cast back to the input's dtype,
    unlike Llama's.

    Attributes:
        weight: [size]; starts at zero.
        is_folded: Whether `weight` already holds 1 + w, as in exported graphs.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.is_folded = False
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of `x` [..., size]; same shape and dtype."""
        scale = self.weight.float() if self.is_folded else self.weight.float() + 1.0
        return F.rms_norm(x.float(), (self.size,), scale, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{self.size}, eps={self.eps}"

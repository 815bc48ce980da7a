import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from gemma_deploy.model.norm import RMSNorm


@pytest.mark.parametrize(
    ("dtype", "atol"),
    # One rounding of numbers up to 8: half a unit in the last place each way.
    [(torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 4e-2)],
)
def test_equals_transformers(dtype: torch.dtype, atol: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(48, 1e-6).to(dtype), Gemma3RMSNorm(48, 1e-6).to(dtype)
    x = (torch.randn(2, 5, 48, generator=generator) * 3).to(dtype)
    with torch.no_grad():
        ours.weight.normal_(0, 1, generator=generator)
        theirs.weight.copy_(ours.weight)
        actual = ours(x)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, theirs(x), atol=atol, rtol=0)


def test_a_folded_weight_gives_the_same() -> None:
    norm, folded = RMSNorm(16, 1e-6), RMSNorm(16, 1e-6)
    folded.is_folded = True
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm.weight.fill_(0.25)
        folded.weight.fill_(1.25)
        assert torch.equal(norm(x), folded(x))


def test_large_half_precision_inputs_do_not_overflow() -> None:
    norm = RMSNorm(16, 1e-6).half()
    with torch.no_grad():
        assert torch.equal(norm(torch.full((16,), 60000.0).half()), torch.ones(16).half())

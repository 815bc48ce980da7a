from typing import Literal

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from gemma_deploy.model.norm import RMSNorm
from tests.rounding import assert_near


# Computed in float32, a mean of 48 squares included, and rounded to the dtype on each side.
@pytest.mark.parametrize(("name", "roundings"), [("float32", 50), ("float16", 2), ("bfloat16", 2)])
def test_equals_transformers(
    name: Literal["float32", "float16", "bfloat16"], roundings: int
) -> None:
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RMSNorm(48, 1e-6).to(dtype), Gemma3RMSNorm(48, 1e-6).to(dtype)
    x = (torch.randn(2, 5, 48, generator=generator) * 3).to(dtype)
    with torch.no_grad():
        ours.weight.normal_(0, 1, generator=generator)
        theirs.weight.copy_(ours.weight)
        actual = ours(x)
        assert actual.dtype == dtype
        assert_near(actual, theirs(x), roundings=roundings, dtype=name)


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

"""Attention said directly, in float64: the oracle of the kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One call of attention: its tensors, and what comes out of them.

    Slots that no query may see hold NaN: reading one shows in the output.
    """

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    input_pos: Tensor
    attributes: tuple[float, float, int]
    expected: Tensor


class MakeProblem(Protocol):
    """Draws a problem; `heads` are query and KV heads."""

    def __call__(
        self,
        *,
        heads: tuple[int, int],
        head_dim: int,
        input_pos: Sequence[int],
        num_tokens: int,
        capacity: int,
        softcap: float = 0.0,
        sliding_window: int = 0,
        dtype: torch.dtype = torch.float16,
    ) -> Problem: ...


@pytest.fixture(scope="session")
def make_problem() -> MakeProblem:
    """Return `make_problem(heads=..., head_dim=..., ...) -> Problem`, on the CPU."""
    return _make_problem


def _make_problem(
    *,
    heads: tuple[int, int],
    head_dim: int,
    input_pos: Sequence[int],
    num_tokens: int,
    capacity: int,
    softcap: float = 0.0,
    sliding_window: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Problem:
    generator = torch.Generator().manual_seed(11)
    batch, (num_heads, num_kv_heads) = len(input_pos), heads
    query = torch.randn(batch, num_tokens, num_heads, head_dim, generator=generator).to(dtype)
    # Sharp enough that a wrong mask or a lost part is far outside of every tolerance.
    scale = 1.5 * head_dim**-0.5
    keys = torch.full((batch, num_kv_heads, capacity, head_dim), torch.nan, dtype=dtype)
    values = keys.clone()
    for row, start in enumerate(input_pos):
        first = max(0, start - sliding_window + 1) if sliding_window else 0
        for cache in (keys, values):
            slots = cache[row, :, first : start + num_tokens]
            slots.copy_(torch.randn(slots.shape, generator=generator))
    attributes = (scale, softcap, sliding_window)
    expected = _attend(query, keys, values, input_pos, attributes)
    return Problem(query, keys, values, torch.tensor(input_pos), attributes, expected)


def _attend(query: Tensor, keys: Tensor, values: Tensor, input_pos: Any, attributes: Any) -> Tensor:
    scale, softcap, sliding_window = attributes
    batch, num_tokens, num_heads, _ = query.shape
    group = num_heads // keys.shape[1]
    output = torch.empty(query.shape, dtype=torch.float64)
    for b in range(batch):
        for i in range(num_tokens):
            last = input_pos[b] + i
            first = max(0, last - sliding_window + 1) if sliding_window else 0
            seen = slice(first, last + 1)
            for k in range(keys.shape[1]):
                rows = slice(k * group, (k + 1) * group)
                scores = query[b, i, rows].double() @ keys[b, k, seen].double().T * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                output[b, i, rows] = scores.softmax(-1) @ values[b, k, seen].double()
    return output

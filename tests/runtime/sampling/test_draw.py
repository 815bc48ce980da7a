from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_deploy.runtime.sampling.candidates import Candidates
from gemma_deploy.runtime.sampling.draw import draw


@pytest.mark.parametrize("size", [1, 5, 511, 1024, 1500, 20_000])
def test_inverts_the_cumulative_probabilities(size: int) -> None:
    generator = np.random.default_rng(size)
    logits = generator.normal(size=size).astype(np.float32) * 3
    weights = np.exp(logits.astype(np.float64) - logits.max())
    cumulative = np.cumsum(weights) / weights.sum()
    for uniform in generator.random(200):
        token = draw(Candidates(logits), uniform)
        # Sums of float32 weights: a draw this close to a boundary may fall on either side.
        assert cumulative[token] >= uniform - 1e-6
        assert (cumulative[token - 1] if token else 0) <= uniform + 1e-6


@given(st.integers(1, 3000), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32))
def test_never_draws_what_has_no_weight(size: int, uniform: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits = np.where(generator.random(size) < 0.9, -1e9, 0).astype(np.float32)
    logits[generator.integers(size)] = 0
    assert logits[draw(Candidates(logits), uniform)] == 0


@pytest.mark.parametrize("size", [7, 1024, 5000])
@pytest.mark.parametrize("to_array", [torch.from_numpy, array_api_strict.asarray])
def test_libraries_draw_the_same(size: int, to_array: Any) -> None:
    generator = np.random.default_rng(size)
    logits = generator.normal(size=size).astype(np.float32)
    for uniform in generator.random(50).tolist():
        on_library = draw(Candidates(to_array(logits)), uniform)
        assert draw(Candidates(logits), uniform) == on_library


def test_extremes_are_the_first_and_last_with_weight() -> None:
    logits = np.full(2000, -1e9, np.float32)
    logits[[3, 1999]] = 0
    assert draw(Candidates(logits), 0.0) == 3
    assert draw(Candidates(logits), np.nextafter(1.0, 0.0)) == 1999

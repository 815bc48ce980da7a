from collections.abc import Callable, Mapping
from typing import Any

import array_api_strict
import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma_deploy.runtime.sampling import Temperature, TopK, TopP
from gemma_deploy.runtime.sampling.candidates import Candidates

LIBRARIES: Mapping[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "torch": torch.from_numpy,
    "strict": array_api_strict.asarray,  # refuses what the array API standard does not promise
}
# Peaked like a trained model's, ordinary, and nearly flat; small and with many blocks.
SHAPES = [(300, 4.0), (300, 0.1), (20_000, 4.0), (20_000, 1.0), (20_000, 0.01)]


def logits_of(size: int, spread: float, seed: int = 0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


def kept_ids(candidates: Candidates) -> list[int]:
    return [candidates.token_id(index) for index in range(len(candidates))]


def oracle_ids(warper: Any, logits: npt.NDArray[np.float32]) -> list[int]:
    # In float64: the oracle's float32 cumulative sum is off by more than a token's probability.
    scores = warper(torch.zeros(1, 0), torch.from_numpy(logits).double()[None])[0]
    ids: list[int] = torch.isfinite(scores).nonzero()[:, 0].tolist()
    return ids


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("size", "spread"), SHAPES)
@pytest.mark.parametrize("count", [1, 2, 50, 299, 400])
def test_top_k_keeps_what_transformers_keeps(
    library: str, size: int, spread: float, count: int
) -> None:
    logits = logits_of(size, spread)
    kept = TopK(count)(Candidates(LIBRARIES[library](logits)))
    assert kept_ids(kept) == oracle_ids(TopKLogitsWarper(count), logits)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("size", "spread"), SHAPES)
@pytest.mark.parametrize("mass", [0.001, 0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_what_transformers_keeps(
    library: str, size: int, spread: float, mass: float
) -> None:
    logits = logits_of(size, spread)
    kept = TopP(mass)(Candidates(LIBRARIES[library](logits)))
    expected = oracle_ids(TopPLogitsWarper(mass), logits)
    # One token more or less where float32 probabilities sum to the mass within their rounding.
    assert len(set(kept_ids(kept)) ^ set(expected)) <= (1 if spread < 0.05 else 0)
    assert kept_ids(kept) == sorted(kept_ids(kept))


def test_top_p_after_top_k_counts_the_mass_of_the_remaining() -> None:
    logits = logits_of(20_000, 1.0)
    kept = TopP(0.5)(TopK(40)(Candidates(logits)))
    scores = torch.from_numpy(logits).double()[None]
    scores = TopPLogitsWarper(0.5)(torch.zeros(1, 0), TopKLogitsWarper(40)(None, scores))
    assert kept_ids(kept) == torch.isfinite(scores[0]).nonzero()[:, 0].tolist()


def test_ties_with_the_last_kept_stay() -> None:
    logits = np.array([1, 3, 2, 2, 0, 2], np.float32)
    assert kept_ids(TopK(2)(Candidates(logits))) == [1, 2, 3, 5]
    assert kept_ids(TopK(2)(Candidates(np.zeros(1000, np.float32)))) == list(range(1000))


def test_top_p_always_keeps_the_likeliest() -> None:
    logits = np.array([0, 100, 0], np.float32)
    assert kept_ids(TopP(1e-6)(Candidates(logits))) == [1]


@pytest.mark.parametrize("value", [0.3, 1.7])
def test_temperature_is_transformers(value: float) -> None:
    logits = logits_of(300, 2.0)
    expected = TemperatureLogitsWarper(value)(None, torch.from_numpy(logits)[None])[0]
    scaled = Temperature(value)(Candidates(logits))
    np.testing.assert_array_equal(scaled.logits, expected.numpy())
    assert len(scaled) == 300

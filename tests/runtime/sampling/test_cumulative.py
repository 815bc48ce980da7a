import numpy as np
import pytest

from gemma_deploy.runtime.sampling.cumulative import passing_index


@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 1500, 20_000])
def test_is_the_first_index_that_passes(size: int) -> None:
    generator = np.random.default_rng(size)
    weights = generator.random(size).astype(np.float32)
    cumulative = np.cumsum(weights.astype(np.float64)) / weights.sum(dtype=np.float64)
    for fraction in generator.random(100):
        index = passing_index(weights, fraction)
        # Blocks are summed in float32: a fraction this close to a boundary may fall on either side.
        assert cumulative[index] >= fraction - 1e-6
        assert (cumulative[index - 1] if index else 0) <= fraction + 1e-6


@pytest.mark.parametrize("size", [100, 3000])
def test_a_fraction_of_one_is_the_last_weight_above_zero(size: int) -> None:
    weights = np.zeros(size, np.float32)
    weights[[3, size - 7]] = 1
    assert passing_index(weights, 0.0) == 3
    assert passing_index(weights, 1.0) == size - 7
    assert passing_index(weights, 1.5) == size - 7

from collections.abc import Callable, Mapping
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from gemma_deploy.runtime.sampling import RepetitionPenalty

LIBRARIES: Mapping[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "torch": torch.from_numpy,
    "strict": array_api_strict.asarray,
}


@pytest.mark.parametrize("value", [0.7, 1.3])
@pytest.mark.parametrize("to_array", LIBRARIES.values(), ids=LIBRARIES)
def test_is_transformers(to_array: Any, value: float) -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 100)).astype(np.float32)
    histories = generator.integers(0, 100, (2, 30))
    given = logits.copy()
    penalized = RepetitionPenalty(value)(to_array(given), list(histories))
    expected = RepetitionPenaltyLogitsProcessor(value)(
        torch.from_numpy(histories), torch.from_numpy(logits)
    )
    np.testing.assert_array_equal(np.asarray(penalized), expected.numpy())
    np.testing.assert_array_equal(given, logits)


@pytest.mark.parametrize("to_array", LIBRARIES.values(), ids=LIBRARIES)
def test_histories_may_differ_in_length(to_array: Any) -> None:
    logits = to_array(np.ones((2, 4), np.float32))
    penalized = RepetitionPenalty(2.0)(logits, [np.array([0]), np.array([1, 2, 2])])
    np.testing.assert_array_equal(np.asarray(penalized), [[0.5, 1, 1, 1], [1, 0.5, 0.5, 1]])

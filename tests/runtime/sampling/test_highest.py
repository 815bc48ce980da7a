from collections.abc import Callable, Mapping
from typing import Any

import array_api_strict
import numpy as np
import numpy.typing as npt
import pytest
import torch

from gemma_deploy.runtime.sampling import highest_if_finite

LIBRARIES: Mapping[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "torch": torch.from_numpy,
    "strict": array_api_strict.asarray,
}
SIZE = 1000


@pytest.fixture
def logits() -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32)


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_highest_of_each_row(library: str, logits: npt.NDArray[np.float32]) -> None:
    # Below zero, too, and as far as float32 goes.
    for scaled in (logits, logits - 100, logits * np.float32(1e37)):
        expected = [row.index(max(row)) for row in scaled.tolist()]
        assert highest_if_finite(LIBRARIES[library](scaled)) == expected


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [0, 1, 500, SIZE - 1])
def test_a_row_that_is_not_finite_has_none(
    library: str, value: float, index: int, logits: npt.NDArray[np.float32]
) -> None:
    first, _, last = (row.index(max(row)) for row in logits.tolist())
    logits[1, index] = value
    assert highest_if_finite(LIBRARIES[library](logits)) == [first, None, last]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_first_of_equals(library: str) -> None:
    logits = np.array([[1, 7, 3, 7], [2, 2, 2, 2]], np.float32)
    assert highest_if_finite(LIBRARIES[library](logits)) == [1, 0]


def test_rows_that_lie_apart_in_memory(logits: npt.NDArray[np.float32]) -> None:
    last_of_several = np.stack([logits + 1, logits], axis=1)[:, 1, :]
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert highest_if_finite(last_of_several) == expected

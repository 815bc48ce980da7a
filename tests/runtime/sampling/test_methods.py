from collections.abc import Callable, Mapping
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sampling import (
    Greedy,
    Sampled,
    Temperature,
    TopK,
    TopP,
    sampling_method,
)

LIBRARIES: Mapping[str, Callable[[Any], Any]] = {
    "numpy": np.asarray,
    "torch": torch.from_numpy,
    "strict": array_api_strict.asarray,
}


def random_logits(rows: int, size: int = 3000) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, size)).astype(np.float32) * 2


@pytest.mark.parametrize("to_array", LIBRARIES.values(), ids=LIBRARIES)
def test_top_1_is_greedy(to_array: Any) -> None:
    logits = to_array(random_logits(4))
    uniforms = [0.0, 0.3, 0.6, 0.999]
    greedy = Greedy()(logits, uniforms)
    assert Sampled((TopK(1),))(logits, uniforms) == greedy
    assert greedy == random_logits(4).argmax(axis=-1).tolist()


@pytest.mark.parametrize("to_array", LIBRARIES.values(), ids=LIBRARIES)
def test_probabilities_are_those_of_transformers(to_array: Any) -> None:
    options = GenerationOptions(temperature=0.6, top_k=80, top_p=0.9)
    method = sampling_method(options)
    assert isinstance(method, Sampled)
    logits = random_logits(1)
    candidates = method.candidates(to_array(logits[0]))
    ids = [candidates.token_id(index) for index in range(len(candidates))]
    actual = np.zeros(3000)
    actual[ids] = torch.softmax(torch.asarray(np.asarray(candidates.logits)).double(), -1)
    warpers: Any = LogitsProcessorList(
        [TemperatureLogitsWarper(0.6), TopKLogitsWarper(80), TopPLogitsWarper(0.9)]
    )
    expected = torch.softmax(
        warpers(torch.zeros(1, 0, dtype=torch.long), torch.from_numpy(logits).double()), -1
    )[0]
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-9)


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.2, 0.3]], np.float32))
    uniforms = np.random.default_rng(0).random(20_000)
    method = Sampled(())
    counts = np.bincount([method(logits, [u])[0] for u in uniforms], minlength=3)
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.2, 0.3], atol=0.015)


def test_rows_do_not_mix() -> None:
    logits, uniforms = random_logits(3), [0.1, 0.5, 0.9]
    method = Sampled((TopP(0.8),))
    alone = [method(logits[i : i + 1], uniforms[i : i + 1])[0] for i in range(3)]
    assert method(logits, uniforms) == alone


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (GenerationOptions(), Greedy()),
        (GenerationOptions(temperature=0, top_k=5), Greedy()),
        (GenerationOptions(temperature=1.0), Sampled(())),
        (GenerationOptions(top_p=1.0), Sampled(())),
        (GenerationOptions(top_k=5), Sampled((TopK(5),))),
        (
            GenerationOptions(temperature=0.5, top_k=5, top_p=0.9),
            Sampled((TopK(5), Temperature(0.5), TopP(0.9))),
        ),
    ],
)
def test_options_name_the_method(options: GenerationOptions, expected: object) -> None:
    assert sampling_method(options) == expected


def largest(logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest logits of each row, in descending order, and whose they are."""
    token_ids = np.argsort(-logits, axis=-1, kind="stable")[:, :count]
    return np.take_along_axis(logits, token_ids, axis=-1), token_ids


@pytest.mark.parametrize("to_array", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(),
        GenerationOptions(top_k=1),
        GenerationOptions(top_k=7, temperature=1.7),
        GenerationOptions(top_k=40, temperature=2.5, top_p=0.8),
    ],
)
def test_the_largest_logits_choose_what_all_choose(
    options: GenerationOptions, to_array: Any
) -> None:
    method = sampling_method(options)
    assert method.num_candidates is not None
    logits = random_logits(60)
    uniforms = np.random.default_rng(1).random(60).tolist()
    for count in (method.num_candidates, 200):
        found, token_ids = largest(logits, count)
        assert all(method.is_decided_by(to_array(row)) for row in found)
        chosen = method(to_array(found), uniforms, to_array(token_ids))
        assert chosen == method(to_array(logits), uniforms)


def test_an_equal_of_the_last_calls_for_all_logits() -> None:
    method = Sampled((TopK(2),))
    assert method.num_candidates == 3
    assert method.is_decided_by(np.array([3, 2, 1], np.float32))
    # Those that were not given may be 2 as well, and top-k keeps equals.
    assert not method.is_decided_by(np.array([3, 2, 2], np.float32))
    assert not method.is_decided_by(np.array([3, 2, 2, 2], np.float32))
    assert method.is_decided_by(np.array([3, 2, 2, 1], np.float32))
    assert not method.is_decided_by(np.array([3, 2], np.float32))


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(temperature=1.0),
        GenerationOptions(top_p=0.5),
        GenerationOptions(temperature=0.5, top_p=0.5),
    ],
)
def test_what_weighs_the_whole_vocabulary_needs_all_logits(options: GenerationOptions) -> None:
    assert sampling_method(options).num_candidates is None


def test_greedy_takes_the_highest_that_is_known() -> None:
    logits = random_logits(2)
    assert Greedy()(logits, [], highest=[7, 5]) == [7, 5]
    # It does not tell the lowest of equals among those that come in any order.
    logits = np.array([[5, 5, 1]], np.float32)
    assert Greedy()(logits, [], np.array([[9, 4, 3]]), highest=[0]) == [4]


def test_sampling_does_not_depend_on_whether_the_highest_is_known() -> None:
    logits, uniforms = random_logits(2), [0.3, 0.8]
    method = Sampled((TopK(40),))
    assert method(logits, uniforms, highest=[1, 2]) == method(logits, uniforms)


@pytest.mark.parametrize("to_array", LIBRARIES.values(), ids=LIBRARIES)
def test_greedy_takes_the_lowest_of_equals(to_array: Any) -> None:
    logits = to_array(np.array([[5, 5, 1], [2, 7, 7]], np.float32))
    token_ids = to_array(np.array([[9, 4, 3], [1, 8, 6]]))
    assert Greedy()(logits, [0.0, 0.0], token_ids) == [4, 6]

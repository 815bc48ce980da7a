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

from typing import Any

import numpy as np
import pytest

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.request import GenerationOptions, with_overrides


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1; it must be 0 or more"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"temperature": 1e-40}, "temperature is 1e-40; it must be 0 .greedy., or 0.0001 to 10000"),
        ({"temperature": 1e300}, "temperature is 1e.300"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be 0.0001 to 10000"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GenerationOptions(**values)  # type: ignore[arg-type]  # one dict for fields of several types


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"max_new_tokens": 2.5},
            r"max_new_tokens is 2.5 \(float\); .* a whole number, at least 1",
        ),
        ({"max_new_tokens": True}, r"max_new_tokens is True \(bool\); .* a whole number"),
        ({"top_k": 5.0}, r"top_k is 5.0 \(float\); .* a whole number, 0 or more"),
        ({"top_k": np.float32(5)}, r"top_k is .*\(float32\); .* a whole number"),
        ({"seed": 1.5}, r"seed is 1.5 \(float\); .* a whole number, 0 or more"),
        ({"temperature": "0.7"}, r"temperature is '0.7' \(str\); .* a number: 0 \(greedy\)"),
        ({"temperature": True}, r"temperature is True \(bool\); .* a number"),
        ({"top_p": [0.9]}, r"top_p is \[0.9\] \(list\); .* a number: above 0 and at most 1"),
        ({"repetition_penalty": "1"}, r"repetition_penalty is '1' \(str\); .* a number"),
        ({"stop_token_ids": None}, r"stop_token_ids is None \(NoneType\); .* a sequence of token"),
        ({"stop_token_ids": 107}, r"stop_token_ids is 107 \(int\); .* a sequence of token ids"),
        ({"stop_token_ids": "107"}, r"stop_token_ids is '107' \(str\); .* a sequence of token ids"),
        ({"stop_token_ids": (1, 2.0)}, r"stop_token_ids\[1\] is 2.0 \(float\); .* a whole number"),
        ({"stop_token_ids": (-1,)}, r"stop_token_ids\[0\] is -1; it must be 0 or more"),
        ({"ignore_eos": "no"}, r"ignore_eos is 'no' \(str\); it must be True or False"),
    ],
)
def test_values_of_another_type_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GenerationOptions(**values)


def test_numbers_of_numpy_become_plain_ones() -> None:
    options = GenerationOptions(
        max_new_tokens=np.int64(3),  # type: ignore[arg-type]  # on purpose
        temperature=np.float32(0.5),  # type: ignore[arg-type]  # on purpose
        top_k=np.uint8(4),  # type: ignore[arg-type]  # on purpose
        seed=np.int32(5),  # type: ignore[arg-type]  # on purpose
        stop_token_ids=np.array([1, 107]),  # type: ignore[arg-type]  # on purpose
    )
    expected = GenerationOptions(
        max_new_tokens=3, temperature=0.5, top_k=4, seed=5, stop_token_ids=(1, 107)
    )
    assert repr(options) == repr(expected)


@pytest.mark.parametrize(
    ("options", "is_greedy"),
    [
        (GenerationOptions(), True),
        (GenerationOptions(temperature=0, top_p=0.9), True),
        (GenerationOptions(top_k=3), False),
        (GenerationOptions(top_p=0.9), False),
        (GenerationOptions(temperature=0.1), False),
        (GenerationOptions(seed=3, repetition_penalty=1.2), True),
    ],
)
def test_sampling_starts_with_temperature_top_k_or_top_p(
    options: GenerationOptions, is_greedy: bool
) -> None:
    assert options.is_greedy is is_greedy


def test_max_length_counts_the_prompt_where_max_new_tokens_says_nothing() -> None:
    assert GenerationOptions().most_new_tokens(10) == 256
    assert GenerationOptions(max_length=30).most_new_tokens(10) == 20
    assert GenerationOptions(max_length=30, max_new_tokens=40).most_new_tokens(10) == 40


def test_overrides_replace_what_they_name() -> None:
    options = GenerationOptions(top_k=3, seed=1)
    assert with_overrides(options, {"seed": 2}) == GenerationOptions(top_k=3, seed=2)
    assert with_overrides(None, {}) == GenerationOptions()
    with pytest.raises(RequestError, match="unknown option top_q; expected ignore_eos, max_length"):
        with_overrides(options, {"top_q": 3})
    with pytest.raises(RequestError, match=r"options is \{'top_k': 3\} \(dict\); expected Gener"):
        with_overrides({"top_k": 3}, {})  # type: ignore[arg-type]  # on purpose

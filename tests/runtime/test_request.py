import pytest

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.request import GenerationOptions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
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

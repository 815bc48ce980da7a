import pytest

from gemma_deploy.runtime.metrics import Timings


def test_rates_are_the_rows_own() -> None:
    timings = Timings(prompt_tokens=100, new_tokens=11, ttft_s=0.5, total_s=2.5)
    assert timings.prefill_tokens_per_s == pytest.approx(200)
    assert timings.decode_tokens_per_s == pytest.approx(5)
    assert timings.to_dict() == {
        "prompt_tokens": 100,
        "new_tokens": 11,
        "ttft_s": 0.5,
        "total_s": 2.5,
        "prefill_tokens_per_s": 200,
        "decode_tokens_per_s": 5,
    }


def test_rates_of_nothing_are_none() -> None:
    nothing = Timings(prompt_tokens=3, new_tokens=0, ttft_s=None, total_s=0.1)
    assert nothing.prefill_tokens_per_s is None
    assert nothing.decode_tokens_per_s is None
    one = Timings(prompt_tokens=3, new_tokens=1, ttft_s=0.1, total_s=0.1)
    assert one.decode_tokens_per_s is None

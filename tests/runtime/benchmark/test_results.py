import json

import numpy as np
import pytest

from gemma_deploy.runtime.benchmark.results import (
    OURS,
    BenchCase,
    BenchReport,
    Contender,
    Measurement,
    Roofline,
    RoundTimes,
    Spread,
    larger,
)

CASE = BenchCase(prompt_tokens=100, new_tokens=3, batch_size=2)
# 200 prompt tokens in 0.5 s and 0.4 s; 2 steps of 2 rows in 0.4 s and in 0.2 s.
OURS_ROUNDS = (
    RoundTimes(ttft_s=0.5, step_s=(0.1, 0.3)),
    RoundTimes(ttft_s=0.4, step_s=(0.1, 0.1)),
)
OURS_MEASURED = Measurement(contender=OURS, case=CASE, rounds=OURS_ROUNDS)
ROOFLINE = Roofline(
    read_bytes_per_s=1e6,
    matrix_flop_per_s=1e5,
    weights_bytes_per_step=10_000,
    cache_bytes_per_token=10,
    flop_per_token=100,
)


def report(*measurements: Measurement) -> BenchReport:
    return BenchReport(
        model="bundle",
        contenders=(Contender(name=OURS, load_s=1.5), Contender(name="slow", skipped="too large")),
        measurements=measurements,
        roofline=ROOFLINE,
        environment={"CPU": "some"},
    )


def test_rates_are_of_all_rows_together() -> None:
    assert OURS_MEASURED.prefill_rates() == pytest.approx([400, 500])
    assert OURS_MEASURED.decode_rates() == pytest.approx([10, 20])
    assert OURS_MEASURED.ttft_s() == Spread(median=0.45, lowest=0.4, highest=0.5)


@pytest.mark.parametrize("percent", [0, 12.5, 50, 90, 99, 100])
def test_percentiles_are_numpy_s(percent: float) -> None:
    steps = tuple(np.random.default_rng(0).random(20).tolist())
    rounds = (RoundTimes(ttft_s=1, step_s=steps[:12]), RoundTimes(ttft_s=1, step_s=steps[12:]))
    measured = Measurement(contender=OURS, case=CASE, rounds=rounds)
    assert measured.step_percentile_s(percent) == pytest.approx(np.percentile(steps, percent))


def test_ratios_pair_rounds_and_not_medians() -> None:
    rounds = (
        RoundTimes(ttft_s=1.0, step_s=(0.4, 0.4)),
        RoundTimes(ttft_s=0.4, step_s=(0.1, 0.1)),
    )
    found = report(OURS_MEASURED, Measurement(contender="slow", case=CASE, rounds=rounds)).ratios(
        "slow", CASE
    )
    assert found is not None
    prefill, decode = found
    assert (prefill.lowest, prefill.highest) == pytest.approx((1, 2))
    assert (decode.lowest, decode.median, decode.highest) == pytest.approx((1, 1.5, 2))


def test_a_baseline_that_stopped_is_compared_as_far_as_it_came() -> None:
    one = Measurement(contender="slow", case=CASE, rounds=OURS_ROUNDS[:1])
    found = report(OURS_MEASURED, one).ratios("slow", CASE)
    assert found is not None
    assert found[1] == Spread(median=1, lowest=1, highest=1)
    assert report(OURS_MEASURED).ratios("slow", CASE) is None


class TestRoofline:
    def test_decode_reads_weights_once_and_each_row_s_cache(self) -> None:
        # 101.5 tokens are cached on average; 7.5 steps a second.
        step_bytes = 10_000 + 2 * 101.5 * 10
        assert ROOFLINE.decode_share(OURS_MEASURED) == pytest.approx(step_bytes * 7.5 / 1e6)

    def test_sliding_layers_read_their_window_at_most(self) -> None:
        sliding = Roofline(
            read_bytes_per_s=1e6,
            matrix_flop_per_s=1e5,
            weights_bytes_per_step=10_000,
            cache_bytes_per_token=10,
            flop_per_token=100,
            window_bytes_per_token=7,
            window_tokens=50,
        )
        step_bytes = 10_000 + 2 * (101.5 * 10 + 50 * 7)
        assert sliding.decode_share(OURS_MEASURED) == pytest.approx(step_bytes * 7.5 / 1e6)

    def test_prefill_multiplies_every_token(self) -> None:
        assert ROOFLINE.prefill_share(OURS_MEASURED) == pytest.approx(450 * 100 / 1e5)


def test_a_report_survives_json() -> None:
    whole = report(OURS_MEASURED)
    assert BenchReport.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole
    assert whole.cases() == [CASE]


def test_larger_of_what_is_known() -> None:
    assert [larger(1, 2), larger(None, 2), larger(1, None), larger(None, None)] == [2, 2, 1, None]

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.guard import Comparison, ratios_outside, table, time_rounds


class TestConfidence:
    # Tables of the sign test give these ranks of the sorted values, counted from 1.
    @pytest.mark.parametrize(
        ("count", "rank"), [(1, 1), (5, 1), (6, 1), (9, 2), (15, 4), (20, 6), (25, 8), (30, 10)]
    )
    def test_ranks_are_those_of_the_sign_test(self, count: int, rank: int) -> None:
        assert ratios_outside(count) == rank - 1

    @given(st.lists(st.floats(min_value=0.1, max_value=10), min_size=1, max_size=40))
    def test_the_median_is_within(self, now: list[float]) -> None:
        found = Comparison.of("decode", [1.0] * len(now), now)

        assert found.lowest <= found.ratio == statistics.median(now) <= found.highest


class TestLoss:
    def test_ratios_are_taken_within_a_round(self) -> None:
        found = Comparison.of("decode", [1.0, 10.0, 2.0], [1.1, 11.0, 2.2])

        assert found.ratio == pytest.approx(1.1)
        assert found.lowest == pytest.approx(found.highest)
        assert (found.before, found.now) == (2.0, 2.2)

    def test_more_than_the_limit_is_a_loss(self) -> None:
        assert Comparison.of("decode", [1.0], [1.06]).is_loss(5)
        assert not Comparison.of("decode", [1.0], [1.06]).is_loss(10)
        assert not Comparison.of("decode", [1.0], [1.04]).is_loss(5)
        assert not Comparison.of("decode", [1.0], [0.5]).is_loss(5)

    def test_what_may_be_noise_is_none(self) -> None:
        noisy = Comparison.of("decode", [1.0] * 5, [0.8, 1.2, 1.2, 1.2, 1.2])

        assert noisy.ratio == 1.2
        assert not noisy.is_loss(5)

    def test_the_table_marks_it(self) -> None:
        lines = list(
            table(
                [
                    Comparison.of("prefill", [1.0, 1.0], [0.9, 1.3]),
                    Comparison.of("decode", [0.1], [0.2]),
                    Comparison.of("instructions", [2e6], [2e6]),
                ],
                5,
            )
        )

        assert [line.split()[-1] for line in lines[1:]] == ["unclear", "LOSS", "1.000"]
        assert lines[2].split()[:5] == ["decode,", "ms", "100.00", "200.00", "2.000"]
        assert lines[3].split()[:3] == ["instructions,", "M", "2.00"]


class _Recorded:
    def __init__(self, name: str, turns: list[str]) -> None:
        self.name = name
        self.turns = turns

    def run(self) -> dict[str, float]:
        self.turns.append(self.name)
        return {"prefill": float(len(self.turns)), "decode": 1.0}


def test_both_run_by_turns_and_the_first_round_does_not_count() -> None:
    turns: list[str] = []

    before, now = time_rounds(_Recorded("before", turns), _Recorded("now", turns), 3)  # type: ignore[arg-type]  # all that is asked of a runner

    assert turns == ["before", "now"] * 4
    assert [x["prefill"] for x in before] == [3, 5, 7]
    assert [x["prefill"] for x in now] == [4, 6, 8]

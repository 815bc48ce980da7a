from typing import Any

import numpy as np
import pytest

from gemma_deploy.runtime.rows import Row


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


@pytest.fixture
def row(clock: Any) -> Row:  # noqa: ARG001  # the row is made by that clock
    return Row([5, 6, 7], 8, np.random.default_rng(0))


def test_a_row_grows_by_its_tokens(row: Row) -> None:
    before = row.sequence
    row.append(9)
    row.append(4)
    assert before.tolist() == [5, 6, 7]
    assert row.sequence.tolist() == [5, 6, 7, 9, 4]
    assert (row.new_tokens, row.num_new_tokens, row.last_token) == ((9, 4), 2, 4)


def test_only_the_first_end_counts(row: Row) -> None:
    row.finish("stop")
    row.finish("cancelled")
    assert row.finish_reason == "stop"


def test_time_before_the_first_step_does_not_count(row: Row, clock: Clock) -> None:
    clock.now_s += 1000
    row.start()
    clock.now_s += 2
    row.append(9)
    clock.now_s += 3
    row.append(4)
    row.finish("length")
    timings = row.timings()
    assert (timings.prompt_tokens, timings.new_tokens) == (3, 2)
    assert (timings.ttft_s, timings.total_s) == (2, 5)


def test_time_between_the_last_token_and_cancelling_does_not_count(row: Row, clock: Clock) -> None:
    row.start()
    clock.now_s += 2
    row.append(9)
    clock.now_s += 1000
    row.finish("cancelled")
    timings = row.timings()
    assert (timings.ttft_s, timings.total_s) == (2, 2)


def test_a_row_without_tokens_took_no_time(row: Row, clock: Clock) -> None:
    clock.now_s += 1000
    row.finish("cancelled")
    timings = row.timings()
    assert (timings.ttft_s, timings.total_s) == (None, 0)

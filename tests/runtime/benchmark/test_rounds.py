from typing import Any

import numpy as np
import pytest

from gemma_deploy.errors import SessionError
from gemma_deploy.runtime.benchmark.results import BenchCase
from gemma_deploy.runtime.benchmark.rounds import CaseRunner
from gemma_deploy.runtime.sessions.session import SessionLimits


def test_one_step_for_the_prompt_and_one_for_each_further_token(scripted_session: Any) -> None:
    runner = CaseRunner(
        scripted_session, BenchCase(prompt_tokens=7, new_tokens=5, batch_size=3), prefill_chunk=512
    )
    for _ in range(2):
        scripted_session.steps.clear()
        times = runner.run()
        assert scripted_session.steps == [(3, 7), (3, 1), (3, 1), (3, 1), (3, 1)]
        assert len(times.step_s) == 4
        assert min(times.ttft_s, *times.step_s) > 0


def test_times_are_those_of_the_steps(
    scripted_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 103.0, 103.5, 104.5])
    monkeypatch.setattr("gemma_deploy.runtime.benchmark.rounds.time.perf_counter", lambda: 0.0)
    runner = CaseRunner(
        scripted_session, BenchCase(prompt_tokens=2, new_tokens=3), prefill_chunk=512
    )
    # Rows look at the clock too: only the runner's own looks are counted here.
    module = type("time", (), {"perf_counter": staticmethod(lambda: next(clock))})
    monkeypatch.setattr("gemma_deploy.runtime.benchmark.rounds.time", module)
    times = runner.run()
    assert times.ttft_s == 3.0
    assert times.step_s == (0.5, 1.0)


def test_a_cache_that_is_too_short_is_told(scripted_session: Any) -> None:
    scripted_session.limits = SessionLimits(max_seq_len=9)
    runner = CaseRunner(
        scripted_session, BenchCase(prompt_tokens=7, new_tokens=5), prefill_chunk=512
    )
    with pytest.raises(
        SessionError, match="ended after 3 tokens; the KV cache holds 9 tokens, and 11 were"
    ):
        runner.run()


def test_the_length_of_the_cache_can_be_given(scripted_session: Any) -> None:
    lengths = []
    new_cache = scripted_session.new_cache

    def spy(batch_size: int, max_seq_len: int) -> Any:
        lengths.append(max_seq_len)
        return new_cache(batch_size, max_seq_len)

    scripted_session.new_cache = spy
    case = BenchCase(prompt_tokens=7, new_tokens=5)
    for max_seq_len in (None, 11):
        runner = CaseRunner(scripted_session, case, prefill_chunk=512, max_seq_len=max_seq_len)
        runner.run()
        runner.free()
    # As text generation allocates it, then exactly.
    assert lengths[1] == 11 < lengths[0]


def test_prompts_are_the_same_for_everyone(scripted_session: Any) -> None:
    seen = []
    step = scripted_session.step

    def spy(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(input_ids.copy())
        return step(input_ids, *args, **kwargs)

    scripted_session.step = spy
    case = BenchCase(prompt_tokens=7, new_tokens=2, batch_size=2)
    for _ in range(2):
        CaseRunner(scripted_session, case, prefill_chunk=512).run()
    np.testing.assert_array_equal(seen[0], seen[2])
    assert (seen[0][0] != seen[0][1]).any()

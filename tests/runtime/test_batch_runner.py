import weakref
from typing import Any

import pytest

from gemma_deploy.errors import NonFiniteLogitsError, SessionError
from gemma_deploy.runtime.batch_runner import BatchRunner
from gemma_deploy.runtime.generator import BatchGeneration, never
from gemma_deploy.runtime.request import GenerationOptions

OPTIONS = GenerationOptions(max_new_tokens=4)
PROMPTS = [[3, 1, 4], [1, 5]]


@pytest.fixture
def runner(scripted_session: Any) -> BatchRunner:
    return BatchRunner(scripted_session, max_seq_len=None, limit=64, prefill_chunk=8)


@pytest.fixture
def alive_caches(scripted_session: Any) -> list[int]:
    """Return, for each cache allocated from now on, how many others were still there."""
    caches: weakref.WeakSet[Any] = weakref.WeakSet()
    alive: list[int] = []
    allocate = scripted_session.new_cache

    def new_cache(batch_size: int, max_seq_len: int) -> Any:
        alive.append(len(caches))
        cache = allocate(batch_size, max_seq_len)
        caches.add(cache)
        return cache

    scripted_session.new_cache = new_cache
    return alive


def start(runner: BatchRunner, prompts: list[list[int]], capacity: int) -> BatchGeneration:
    return runner.start(prompts, OPTIONS, capacity, stop_token_ids=())


def test_a_cache_that_suffices_is_kept(runner: BatchRunner, alive_caches: list[int]) -> None:
    for prompts, capacity in ((PROMPTS, 16), (PROMPTS[:1], 16), (PROMPTS, 12)):
        batch = start(runner, prompts, capacity)
        assert not runner.run(batch, never)
        assert [row.finish_reason for row in batch.rows] == ["length"] * len(prompts)
    assert alive_caches == [0]


def test_a_cache_is_freed_before_its_successor_is_allocated(
    runner: BatchRunner, alive_caches: list[int]
) -> None:
    runner.run(start(runner, PROMPTS[:1], 16), never)
    runner.run(start(runner, PROMPTS, 16), never)  # more rows
    runner.run(start(runner, PROMPTS, 32), never)  # longer ones
    assert alive_caches == [0, 0, 0]


def test_a_cache_is_freed_after_an_error(
    runner: BatchRunner, scripted_session: Any, alive_caches: list[int]
) -> None:
    scripted_session.logits_at_step = {1: float("nan")}
    with pytest.raises(NonFiniteLogitsError):
        runner.run(start(runner, PROMPTS, 16), never)
    runner.run(start(runner, PROMPTS, 16), never)
    assert alive_caches == [0, 0]


def test_batches_that_are_open_together_have_caches_of_their_own(
    runner: BatchRunner, alive_caches: list[int]
) -> None:
    expected = start(runner, PROMPTS, 16)
    runner.run(expected, never)
    batches = [start(runner, PROMPTS, 16) for _ in range(2)]
    for _ in zip(*(runner.steps(batch) for batch in batches), strict=True):
        pass
    for batch in batches:
        assert [r.new_tokens for r in batch.rows] == [r.new_tokens for r in expected.rows]
    assert alive_caches == [0, 1]


def test_a_batch_that_never_runs_needs_no_cache(
    runner: BatchRunner, alive_caches: list[int]
) -> None:
    batch = start(runner, PROMPTS, 16)
    runner.steps(batch).close()
    assert alive_caches == []


def test_a_batch_dropped_in_the_middle_gives_its_cache_back(
    runner: BatchRunner, alive_caches: list[int]
) -> None:
    steps = runner.steps(start(runner, PROMPTS, 16))
    next(steps)
    del steps
    runner.run(start(runner, PROMPTS, 16), never)
    assert alive_caches == [0]


def test_the_larger_of_two_idle_caches_is_kept(
    runner: BatchRunner, alive_caches: list[int]
) -> None:
    small, large = (start(runner, PROMPTS, capacity) for capacity in (8, 16))
    for _ in zip(runner.steps(large), runner.steps(small), strict=True):
        pass
    runner.run(start(runner, PROMPTS, 16), never)
    assert alive_caches == [0, 1]


def test_progress_is_told_for_each_chunk_of_the_prompts(runner: BatchRunner) -> None:
    told: list[tuple[int, int]] = []
    batch = start(runner, [[1] * 20, [2] * 5], 32)
    runner.run(batch, never, lambda *progress: told.append(progress))
    assert told == [(0, 25), (8, 25), (16, 25), (20, 25), (25, 25)]


def test_after_closing_nothing_runs(runner: BatchRunner, scripted_session: Any) -> None:
    batch = start(runner, PROMPTS, 16)
    steps = runner.steps(batch)
    next(steps)
    runner.close()
    assert scripted_session.is_closed
    with pytest.raises(SessionError, match="the model is closed: load it again"):
        next(steps)
    assert {row.finish_reason for row in batch.rows} == {"cancelled"}
    with pytest.raises(SessionError, match="the model is closed"):
        runner.capacity(PROMPTS, OPTIONS)

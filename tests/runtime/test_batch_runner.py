import weakref
from typing import Any

import pytest

from gemma_deploy.errors import NonFiniteLogitsError
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


def test_a_new_batch_cancels_the_one_before(runner: BatchRunner) -> None:
    first = start(runner, PROMPTS, 16)
    second = start(runner, PROMPTS, 16)
    assert runner.run(first, never)
    assert {row.finish_reason for row in first.rows} == {"cancelled"}
    assert not runner.run(second, never)

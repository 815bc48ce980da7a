"""The loop, on a session that needs no model and notices every misplaced token."""

import time
from collections.abc import Sequence
from typing import Any

import array_api_strict
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_deploy.errors import NonFiniteLogitsError
from gemma_deploy.runtime.generator import BatchGeneration
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions.session import StepLogits

VOCAB_SIZE = 16
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9]]


def script(prompt: Sequence[int], count: int) -> list[int]:
    """What the scripted session says: the sum of everything so far plus one."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append((sum(sequence) + 1) % VOCAB_SIZE)
    return sequence[len(prompt) :]


def start(
    session: Any, prompts: list[list[int]], *, capacity: int = 64, **arguments: Any
) -> BatchGeneration:
    options = GenerationOptions(**arguments.pop("options", {"max_new_tokens": 10}))
    cache = session.new_cache(len(prompts), capacity)
    return BatchGeneration(session, cache, prompts, options, **arguments)


def run(session: Any, prompts: list[list[int]], **arguments: Any) -> BatchGeneration:
    batch = start(session, prompts, **arguments)
    for _ in batch.steps():
        pass
    return batch


def texts(batch: BatchGeneration) -> list[list[int]]:
    return [list(row.new_tokens) for row in batch.rows]


def test_ragged_prompts_run_as_one_batch(scripted_session: Any) -> None:
    batch = run(scripted_session, PROMPTS)
    assert texts(batch) == [script(prompt, 10) for prompt in PROMPTS]
    assert [row.finish_reason for row in batch.rows] == ["length"] * 4
    assert scripted_session.steps == [(4, 7)] + [(4, 1)] * 9


def test_a_row_runs_no_tokens_but_its_own(scripted_session: Any) -> None:
    run_step = scripted_session.step
    stop = script(PROMPTS[0], 4)[3]

    def watched(input_ids: Any, *arguments: Any, **options: Any) -> Any:
        for token_ids, row in zip(input_ids.tolist(), batch.rows, strict=True):
            # Padding and what an ended row still runs included: it may not be a stranger's.
            assert set(token_ids) <= set(row.sequence.tolist())
        return run_step(input_ids, *arguments, **options)

    scripted_session.step = watched
    batch = start(scripted_session, PROMPTS, stop_token_ids=[stop])
    list(batch.steps())
    assert {row.finish_reason for row in batch.rows} == {"stop", "length"}


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_long_prompts_run_in_chunks_row_by_row(scripted_session: Any, chunk: int) -> None:
    batch = run(scripted_session, PROMPTS, prefill_chunk=chunk)
    assert texts(batch) == [script(prompt, 10) for prompt in PROMPTS]
    prefill = scripted_session.steps[:-9]
    assert all(rows == 1 and length <= chunk for rows, length in prefill)
    assert sum(length for _, length in prefill) == sum(map(len, PROMPTS))


def test_a_stop_token_ends_its_row_only(scripted_session: Any) -> None:
    stop = script(PROMPTS[0], 4)[3]
    batch = run(scripted_session, PROMPTS, stop_token_ids=[stop])
    for row, prompt in zip(batch.rows, PROMPTS, strict=True):
        expected = script(prompt, 10)
        if stop in expected:
            assert row.finish_reason == "stop"
            assert list(row.new_tokens) == expected[: expected.index(stop) + 1]
        else:
            assert row.finish_reason == "length"
            assert list(row.new_tokens) == expected
    assert {row.finish_reason for row in batch.rows} == {"stop", "length"}


def test_the_end_of_the_cache_ends_a_row(scripted_session: Any) -> None:
    batch = run(scripted_session, PROMPTS, capacity=8)
    # The last token needs no room: nothing is read after it.
    assert texts(batch) == [script(prompt, min(10, 8 - len(prompt) + 1)) for prompt in PROMPTS]
    assert [row.finish_reason for row in batch.rows] == ["length"] * 4


def test_a_prompt_that_fills_the_cache_gets_one_token(scripted_session: Any) -> None:
    batch = run(scripted_session, [[1, 2, 3]], capacity=3)
    assert texts(batch) == [script([1, 2, 3], 1)]


@pytest.mark.parametrize("step", [1, 3])
def test_cancelled_keeps_what_was_generated(scripted_session: Any, step: int) -> None:
    batch = start(scripted_session, PROMPTS)
    calls = iter(range(100))
    for _ in batch.steps(lambda: next(calls) >= step):
        pass
    assert texts(batch) == [script(prompt, step) for prompt in PROMPTS]
    assert {row.finish_reason for row in batch.rows} == {"cancelled"}


def test_cancelled_between_chunks_runs_no_further(scripted_session: Any) -> None:
    batch = start(scripted_session, PROMPTS, prefill_chunk=2)
    for _ in batch.steps(lambda: len(scripted_session.steps) >= 3):
        pass
    assert len(scripted_session.steps) == 3
    assert texts(batch) == [[], [], [], []]
    assert {row.finish_reason for row in batch.rows} == {"cancelled"}


def test_ctrl_c_in_a_step_keeps_what_was_generated(scripted_session: Any) -> None:
    def interrupt(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    scripted_session.on_step = interrupt
    batch = run(scripted_session, PROMPTS)
    assert texts(batch) == [script(prompt, 3) for prompt in PROMPTS]
    assert {row.finish_reason for row in batch.rows} == {"cancelled"}


def test_closing_the_iterator_cancels(scripted_session: Any) -> None:
    batch = start(scripted_session, PROMPTS)
    steps = batch.steps()
    next(steps)
    steps.close()
    assert texts(batch) == [script(prompt, 1) for prompt in PROMPTS]
    assert {row.finish_reason for row in batch.rows} == {"cancelled"}


def test_a_batch_cancelled_from_outside_stops(scripted_session: Any) -> None:
    batch = start(scripted_session, PROMPTS)
    batch.cancel()
    assert list(batch.steps()) == []
    assert scripted_session.steps == []


def spoil(session: Any, step: int, row: int, token_id: int, value: float) -> None:
    """Make one entry of one step's logits `value`."""
    run_step = session.step

    def spoiled(*arguments: Any, **options: Any) -> Any:
        found = run_step(*arguments, **options)
        if len(session.steps) == step + 1:
            found.logits[row, 0, token_id] = value
        return found

    session.step = spoiled


# Every way a check of the whole could miss one: which row, which token, which kind.
NON_FINITE = [float("nan"), float("inf"), float("-inf")]
PLACES = [(0, 0), (1, 7), (2, VOCAB_SIZE - 1), (3, 3)]


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize(("row", "token_id"), PLACES)
@pytest.mark.parametrize("step", [0, 2])
def test_one_non_finite_logit_names_its_prompt_the_step_and_the_remedy(
    scripted_session: Any, step: int, row: int, token_id: int, value: float
) -> None:
    spoil(scripted_session, step, row, token_id, value)
    message = (
        rf"NaN or infinity for prompt {11 + row}, new token {step + 1} "
        rf"\(after {len(PROMPTS[row]) + step} tokens.*float16.*--dtype bfloat16 or float32. "
        "Otherwise the checkpoint's weights or the input are at fault: .*gemma-deploy verify"
    )
    batch = start(scripted_session, PROMPTS, first_row=10)
    with pytest.raises(NonFiniteLogitsError, match=message):
        list(batch.steps())
    assert texts(batch) == [script(prompt, step) for prompt in PROMPTS]


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize(("row", "step"), [(0, 1), (1, 5), (3, 8)])
def test_a_non_finite_logit_of_a_prompt_s_last_chunk_is_found(
    scripted_session: Any, row: int, step: int, value: float
) -> None:
    # Chunks of two: steps 0 and 1, 2 to 5, 6, 7 and 8 of one row each.
    spoil(scripted_session, step, 0, 9, value)
    with pytest.raises(NonFiniteLogitsError, match=f"for prompt {row + 1}, new token 1 "):
        run(scripted_session, PROMPTS, prefill_chunk=2)


def test_a_non_finite_logit_after_a_row_has_ended_names_the_right_prompt(
    scripted_session: Any,
) -> None:
    stop = script(PROMPTS[0], 1)[0]
    assert stop not in script(PROMPTS[1], 4)
    spoil(scripted_session, 2, 1, 4, float("inf"))
    with pytest.raises(NonFiniteLogitsError, match="for prompt 2, new token 3 "):
        run(scripted_session, PROMPTS[:2], stop_token_ids=[stop])


def test_non_finite_logits_of_an_ended_row_do_not_matter(scripted_session: Any) -> None:
    prompts = [PROMPTS[1], PROMPTS[0]]
    stop = script(PROMPTS[0], 1)[0]
    assert stop not in script(PROMPTS[1], 4)
    scripted_session.logits_at_step = {1: float("nan")}  # of the last row, which has ended
    batch = run(scripted_session, prompts, stop_token_ids=[stop], options={"max_new_tokens": 4})
    assert texts(batch) == [script(PROMPTS[1], 4), [stop]]


def test_the_likeliest_is_that_of_the_penalized_logits(scripted_session: Any) -> None:
    run_step = scripted_session.step

    def two_that_are_likely(*arguments: Any, **options: Any) -> Any:
        found = run_step(*arguments, **options)
        found.logits[..., :] = 0
        found.logits[..., 3] = 5
        found.logits[..., 4] = 4
        return found

    scripted_session.step = two_that_are_likely
    options = {"max_new_tokens": 4, "repetition_penalty": 2.0}
    assert texts(run(scripted_session, [[5]], options=options)) == [[3, 4, 3, 3]]


SAMPLED = {"max_new_tokens": 20, "temperature": 3.0}


def test_a_seed_decides_the_text(scripted_session: Any) -> None:
    def sample(**options: Any) -> list[list[int]]:
        return texts(run(scripted_session, PROMPTS, options={**SAMPLED, **options}))

    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)
    assert sample() != sample()


def test_the_same_prompt_in_two_rows_gets_two_texts(scripted_session: Any) -> None:
    first, second = texts(run(scripted_session, [[1, 2]] * 2, options={**SAMPLED, "seed": 1}))
    assert first != second


@given(
    st.lists(
        st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=12), min_size=1, max_size=5
    ),
    st.integers(1, 12),
    st.sampled_from([{}, {"temperature": 3.0}, {"top_k": 4, "repetition_penalty": 2.0}]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it keeps no state
def test_a_row_does_not_depend_on_its_neighbours(
    scripted_session: Any, prompts: list[list[int]], chunk: int, sampling: dict[str, Any]
) -> None:
    options = {"max_new_tokens": 8, "seed": 5, **sampling}
    arguments: dict[str, Any] = {"options": options, "stop_token_ids": [7]}
    together = texts(run(scripted_session, prompts, prefill_chunk=chunk, **arguments))
    for number, prompt in enumerate(prompts):
        alone = run(scripted_session, [prompt], first_row=number, **arguments)
        assert texts(alone) == [together[number]]


@pytest.mark.parametrize("chunk", [3, 12])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 3.0, "top_p": 0.9}, {"top_k": 4, "repetition_penalty": 2.0}]
)
def test_the_loop_needs_nothing_beyond_the_array_api_standard(
    scripted_session: Any, sampling: dict[str, Any], chunk: int
) -> None:
    arguments: dict[str, Any] = {
        "options": {"max_new_tokens": 8, "seed": 5, **sampling},
        "stop_token_ids": [7],
        "prefill_chunk": chunk,
    }
    expected = texts(run(scripted_session, PROMPTS, **arguments))
    run_step = scripted_session.step
    scripted_session.xp = array_api_strict
    scripted_session.step = lambda *step, **options: StepLogits(
        array_api_strict.asarray(run_step(*step, **options).logits)
    )
    assert texts(run(scripted_session, PROMPTS, **arguments)) == expected


def test_timings_are_of_the_row(scripted_session: Any) -> None:
    scripted_session.on_step = lambda _: time.sleep(0.002)
    batch = run(scripted_session, PROMPTS)
    for row, prompt in zip(batch.rows, PROMPTS, strict=True):
        timings = row.timings()
        assert (timings.prompt_tokens, timings.new_tokens) == (len(prompt), 10)
        assert timings.ttft_s is not None
        assert 0.002 <= timings.ttft_s < timings.total_s
        assert timings.total_s >= 0.02

"""Generation from the largest logits alone: a session that picks them out of a real session's."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from gemma_deploy.errors import NonFiniteLogitsError
from gemma_deploy.runtime.generator import BatchGeneration
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions.session import SessionLimits, StepLogits

PROMPTS = [[2, 71, 40, 9, 77], [2, 15], [2, 100, 101, 102, 103, 104, 105, 106, 107, 108]]
COUNT = 24


@dataclass
class LargestLogits:
    """Gives the largest logits of another session's steps where they suffice, as an engine does."""

    session: Any
    round_to: float | None = None
    asked: list[int | None] = field(default_factory=list)
    limits: SessionLimits = field(default_factory=SessionLimits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def step(self, *arguments: Any, num_candidates: int | None = None) -> StepLogits:
        self.asked.append(num_candidates)
        logits = self.session.step(*arguments).logits
        if self.round_to is not None:
            logits = np.round(logits / self.round_to) * np.float32(self.round_to)
        if num_candidates is None or num_candidates > COUNT:
            return StepLogits(logits)
        token_ids = np.argsort(-logits, axis=-1, kind="stable")[..., :COUNT]
        return StepLogits(np.take_along_axis(logits, token_ids, axis=-1), token_ids)


class AllLogits(LargestLogits):
    """Gives all logits of the same steps."""

    def step(self, *arguments: Any, num_candidates: int | None = None) -> StepLogits:  # noqa: ARG002 - the protocol's; more may be given
        return super().step(*arguments)


def texts(session: Any, options: dict[str, Any], **arguments: Any) -> list[list[int]]:
    cache = session.new_cache(len(PROMPTS), 64)
    batch = BatchGeneration(
        session, cache, PROMPTS, GenerationOptions(max_new_tokens=20, **options), **arguments
    )
    for _ in batch.steps():
        pass
    return [list(row.new_tokens) for row in batch.rows]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 5, "seed": 3},
    {"top_k": 20, "temperature": 2.0, "top_p": 0.9, "seed": 4},
    {"top_k": 100, "temperature": 3.0, "seed": 5},
    {"temperature": 1.5, "seed": 6},
    {"top_p": 0.8, "seed": 7},
    {"top_k": 20, "repetition_penalty": 1.5, "seed": 8},
]


@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_seed_gives_the_same_text(
    options: dict[str, Any], chunk: int, onnxruntime_session: Any
) -> None:
    session = onnxruntime_session("gemma3")
    expected = texts(session, options, prefill_chunk=chunk)
    assert texts(LargestLogits(session), options, prefill_chunk=chunk) == expected


def test_ties_are_settled_with_all_logits(onnxruntime_session: Any) -> None:
    # Logits rounded until many are equal, as those of 16 bits may be.
    options = {"top_k": 20, "temperature": 2.0, "seed": 4}
    largest = LargestLogits(onnxruntime_session("gemma3"), round_to=0.5)
    whole = AllLogits(onnxruntime_session("gemma3"), round_to=0.5)
    assert texts(largest, options) == texts(whole, options)
    assert set(largest.asked) == {21, None}


def test_only_what_is_needed_is_asked_for(onnxruntime_session: Any) -> None:
    for options, wanted in (({}, 1), ({"top_k": 5}, 6), ({"repetition_penalty": 2.0}, None)):
        session = LargestLogits(onnxruntime_session("gemma1"))
        texts(session, options)
        assert set(session.asked) == {wanted}


def test_a_chunk_that_is_not_the_last_needs_no_logits(onnxruntime_session: Any) -> None:
    session = LargestLogits(onnxruntime_session("gemma1"))
    texts(session, {"temperature": 1.0, "seed": 1}, prefill_chunk=4)
    # Rows of 5, 2 and 10 tokens: two, one and three chunks.
    assert session.asked[:6] == [1, None, None, 1, 1, None]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}])
def test_a_position_that_is_not_finite_is_an_error(
    options: dict[str, Any], onnxruntime_session: Any
) -> None:
    session = LargestLogits(onnxruntime_session("gemma1"))
    run_step = session.step

    def spoiled(*arguments: Any, num_candidates: int | None = None) -> StepLogits:
        found = run_step(*arguments, num_candidates=num_candidates)
        logits = np.array(found.logits)
        logits[1] = np.nan  # what a session makes of a row with a logit that is not finite
        return StepLogits(logits, found.token_ids)

    session.step = spoiled  # type: ignore[method-assign]  # on purpose
    with pytest.raises(NonFiniteLogitsError, match="for prompt 2, new token 1"):
        texts(session, options)

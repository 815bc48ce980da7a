from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from gemma_deploy.cli import graph_walks
from gemma_deploy.cli.graph_walks import BATCH_WALKS, TEXT_WALKS, Walk
from gemma_deploy.parity import TokenRow
from gemma_deploy.runtime.sessions.session import SessionLimits, StepLogits

VOCAB = 7


@dataclass
class SumSession:
    """A model whose logits after a token are the running sum of the row's tokens, times 1 to V.

    The logits' memory is one array that every step writes again, as a session may have it.
    """

    steps: list[tuple[int, ...]] = field(default_factory=list)
    memory: Any = None
    config: Any = None
    device: Any = None
    xp: Any = np
    limits: ClassVar = SessionLimits()

    def new_cache(self, batch_size: int, max_seq_len: int) -> Any:
        return np.zeros((batch_size, max_seq_len), np.int64)

    def step(
        self,
        input_ids: Any,
        input_pos: Any,
        logits_index: Any,
        cache: Any,
        *,
        num_candidates: int | None = None,  # noqa: ARG002 - the protocol's
    ) -> StepLogits:
        self.steps.append(input_ids.shape)
        logits = np.empty((*logits_index.shape, VOCAB), np.float32)
        for row, start in enumerate(input_pos):
            fits = min(input_ids.shape[1], cache.shape[1] - start)
            cache[row, start : start + fits] = input_ids[row, :fits]
            sums = cache[row].cumsum()[start + logits_index[row]]
            logits[row] = sums[:, None] * np.arange(1, VOCAB + 1)
        if self.memory is None or self.memory.shape != logits.shape:
            self.memory = logits
        self.memory[...] = logits
        return StepLogits(self.memory)

    def close(self) -> None:
        """Hold nothing."""


LONG = TokenRow(token_ids=tuple(range(1, 101)), positions=(0, 3, 47, 48, 99))
BATCH = (
    TokenRow(token_ids=(5, 1, 4, 2, 6), positions=(2, 3, 4)),
    TokenRow(token_ids=(9, 9, 9), positions=(0, 1, 2)),
    TokenRow(token_ids=tuple(range(10)), positions=(7, 8, 9)),
)


@pytest.mark.parametrize("name", TEXT_WALKS)
def test_walks_of_a_text_give_its_logits(name: str) -> None:
    check(TEXT_WALKS[name], [LONG, BATCH[0]])


@pytest.mark.parametrize("name", BATCH_WALKS)
def test_walks_of_a_batch_give_its_logits(name: str) -> None:
    check(BATCH_WALKS[name], BATCH)


def test_chunks_are_several_and_the_last_is_shorter() -> None:
    session = SumSession()

    list(graph_walks.chunked(session, [LONG]))

    assert session.steps == [(1, 48), (1, 48), (1, 4)]


def test_steps_are_of_one_token() -> None:
    session = SumSession()

    list(graph_walks.stepwise(session, [LONG]))

    assert session.steps == [(1, 1)] * 100


def test_a_batch_is_read_at_once_and_continued_token_by_token() -> None:
    session = SumSession()

    list(graph_walks.ragged(session, BATCH))

    assert session.steps == [(3, 8), (3, 1), (3, 1)]


def test_a_batch_is_continued_by_several_tokens_of_rows_of_all_lengths() -> None:
    session = SumSession()

    list(graph_walks.ragged_chunks(session, BATCH))

    assert session.steps == [(3, 7), (3, 3)]


def check(walk: Walk, rows: Sequence[TokenRow]) -> None:
    for row, logits in zip(rows, walk(SumSession(), rows), strict=True):
        sums = np.cumsum(row.token_ids)[list(row.positions)]
        np.testing.assert_array_equal(logits, sums[:, None] * np.arange(1, VOCAB + 1))

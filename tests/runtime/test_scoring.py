from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from gemma_deploy.runtime.scoring import TextLogits, piece_size
from gemma_deploy.runtime.sessions.session import Session, SessionLimits
from gemma_deploy.runtime.sessions.torch_session import TorchSession
from tests.rounding import MODEL_FLOAT32, assert_near


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Any) -> Iterator[TorchSession]:
    folder: Path = tiny_checkpoint("gemma3")
    with TorchSession(folder) as session:
        yield session


@pytest.mark.parametrize("first", [0, 9, 10, 36])
def test_pieces_are_the_logits_of_the_whole_text(
    first: int, session: TorchSession, oracle: Any, tiny_checkpoint: Any
) -> None:
    import torch

    token_ids = np.random.default_rng(0).integers(512, size=37)
    reader = TextLogits(session, 64, piece_tokens=10)
    longer = np.random.default_rng(1).integers(512, size=64)
    list(reader.pieces(longer))  # what it leaves in the cache must not be seen

    pieces = [np.array(piece) for piece in reader.pieces(token_ids, first)]

    with torch.inference_mode():
        expected = oracle(tiny_checkpoint("gemma3"))(torch.tensor(token_ids[None])).logits[0]
    found = np.concatenate(pieces)
    assert found.dtype == np.float32
    assert max(len(piece) for piece in pieces) <= 10
    assert_near(found, expected[first:], roundings=MODEL_FLOAT32)


@pytest.mark.parametrize(
    ("vocab_size", "limits", "expected"),
    [
        (512, SessionLimits(), 512),
        (262_144, SessionLimits(), 64),
        (512, SessionLimits(max_step_tokens=100), 100),
        (512, SessionLimits(max_step_tokens=100, max_step_logits=1), 1),
    ],
)
def test_piece_size_keeps_to_memory_and_limits(
    vocab_size: int, limits: SessionLimits, expected: int
) -> None:
    small = SimpleNamespace(config=SimpleNamespace(vocab_size=16), limits=SessionLimits())
    other = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size), limits=limits)

    assert piece_size(cast(Session, small), cast(Session, other)) == expected

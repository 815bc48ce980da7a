"""Texts of byte tokens, which make a character only together, from a session that follows a script."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.text_generator import TextGenerator
from gemma_deploy.tokenizer import GemmaTokenizer

# The euro sign and the smiley are no tokens of their own: three bytes, and four at the end.
TEXT = "Names €5, 日本 😀"


@pytest.fixture
def generator(text_checkpoint: Any, scripted_session: Any) -> TextGenerator:
    folder: Path = text_checkpoint("gemma1")
    scripted_session.vocab_size = 512
    tokenizer = GemmaTokenizer.from_pretrained(folder)
    return TextGenerator(scripted_session, tokenizer, ModelSource.open(folder))


def say(session: Any, token_ids: Sequence[int]) -> None:
    """Let the session's next steps choose these tokens."""
    session.steps.clear()
    logits = np.eye(session.vocab_size, dtype=np.float32)
    session.logits_at_step = {step: logits[token] for step, token in enumerate(token_ids)}


@pytest.mark.parametrize(
    ("num_missing", "text"),
    [
        (0, TEXT),
        # Every byte of a run that is no UTF-8 shows, as in the tokenizer's own decode.
        (1, "Names €5, 日本 \ufffd\ufffd\ufffd"),
        (3, "Names €5, 日本 \ufffd"),
        (4, "Names €5, 日本 "),
    ],
)
def test_characters_of_several_bytes_arrive_whole(
    generator: TextGenerator, scripted_session: Any, num_missing: int, text: str
) -> None:
    token_ids = generator.tokenizer.encode(TEXT, add_bos=False)
    token_ids = token_ids[: len(token_ids) - num_missing]
    say(scripted_session, token_ids)
    with generator.stream("Names", max_new_tokens=len(token_ids)) as stream:
        pieces = list(stream)
    assert stream.result.token_ids == tuple(token_ids)
    assert "".join(pieces) == stream.result.text == text
    assert any(piece.startswith("€") for piece in pieces)
    say(scripted_session, token_ids)
    (result,) = generator.generate("Names", max_new_tokens=len(token_ids))
    assert result.text == text

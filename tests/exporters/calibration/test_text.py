from pathlib import Path

import pytest
import torch

from gemma_deploy.errors import RequestError
from gemma_deploy.exporters.calibration.text import default_text, token_rows
from gemma_deploy.tokenizer import GemmaTokenizer

TINY_GEMMA = Path(__file__).parents[3] / "samples" / "tiny-gemma"


@pytest.fixture(scope="module")
def tokenizer() -> GemmaTokenizer:
    return GemmaTokenizer.from_pretrained(TINY_GEMMA)


def test_rows_are_the_text_in_order_each_behind_bos(tokenizer: GemmaTokenizer) -> None:
    text = "A row of words. " * 50
    rows = token_rows(
        tokenizer, text, row_tokens=16, min_tokens=100, max_tokens=1000, vocab_size=4096
    )
    assert set(rows[:, 0].tolist()) == {tokenizer.bos_token_id}
    ids = tokenizer.encode(text, add_bos=False)
    body = rows[:, 1:].flatten().tolist()
    assert body == ids[: len(body)]
    assert len(ids) - len(body) < 15


def test_no_more_is_read_than_asked_for(tokenizer: GemmaTokenizer) -> None:
    rows = token_rows(
        tokenizer, None, row_tokens=64, min_tokens=1, max_tokens=1000, vocab_size=4096
    )
    assert rows.shape == (15, 64)
    assert rows.dtype == torch.int64


def test_a_short_text_is_a_short_row(tokenizer: GemmaTokenizer) -> None:
    rows = token_rows(
        tokenizer, "Hello.", row_tokens=64, min_tokens=1, max_tokens=1000, vocab_size=4096
    )
    assert rows[0].tolist() == tokenizer.encode("Hello.", add_bos=True)


def test_a_text_that_is_too_short_says_what_is_needed(tokenizer: GemmaTokenizer) -> None:
    count = len(tokenizer.encode("Hello.", add_bos=False))
    message = rf"the calibration text has {count} tokens of this model; at least 500 are needed"
    with pytest.raises(RequestError, match=message):
        token_rows(
            tokenizer, "Hello.", row_tokens=64, min_tokens=500, max_tokens=1000, vocab_size=4096
        )


def test_tokens_without_an_embedding_are_refused(tokenizer: GemmaTokenizer) -> None:
    last = max(tokenizer.encode("Hello.", add_bos=False))
    with pytest.raises(
        RequestError, match=f"has token {last}, and the model has embeddings of {last}:"
    ):
        token_rows(
            tokenizer, "Hello.", row_tokens=64, min_tokens=1, max_tokens=1000, vocab_size=last
        )


def test_the_built_in_text_is_varied() -> None:
    paragraphs = default_text().split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) > 50
    for sign in ("def ", "das ", "的", "の", "и", "{", "|"):
        assert sign in default_text()

"""The rows of tokens that `verify` compares logits at."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from gemma_deploy.bundle import Bundle
from gemma_deploy.cli import verify_text
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.parity import TokenRow
from gemma_deploy.tokenizer import GemmaTokenizer

# Tokens that the rows of a batch are continued by, one at a time.
_CONTINUATION_TOKENS: Final = 6
_MIN_TEXT_TOKENS: Final = 16
_RANDOM_ROW_TOKENS: Final = (29, 13, 8)
# The logits of the long text that are kept, in float32: 190 positions of 262,144 tokens.
_MAX_LOGITS_BYTES: Final = 200_000_000


def token_rows(bundle: Bundle, text: str | None, tokens: int) -> tuple[TokenRow, ...]:
    """Return the long text, then the shorter ones that make the batch.

    Args:
        bundle: Whose tokenizer is used; without one any ids will do, the same each time.
        text: What is read; None for a text of our own, repeated until it is long enough.
        tokens: Most tokens of the text that are read; the model's limit bounds it too.

    Raises:
        RequestError: The text is too short, or its tokens are not the model's.
    """
    from gemma_deploy.runtime.capacity import check_token_ids

    limit = min(tokens, bundle.manifest.max_seq_len)
    vocab_size = bundle.config.vocab_size
    if bundle.manifest.tokenizer:
        tokenizer = GemmaTokenizer.from_pretrained(bundle.folder)
        long = _repeated(tokenizer, limit) if text is None else tokenizer.encode(text)
        others = [tokenizer.encode(other)[:limit] for other in verify_text.OTHERS]
    else:
        random = np.random.default_rng(0)
        lengths = (limit, *(min(limit, n) for n in _RANDOM_ROW_TOKENS))
        long, *others = (random.integers(vocab_size, size=n).tolist() for n in lengths)
    long = long[:limit]
    check_token_ids([long, *others], vocab_size)
    if len(long) < _MIN_TEXT_TOKENS:
        raise RequestError(
            f"the text has {len(long)} tokens; at least {_MIN_TEXT_TOKENS} are needed "
            "to compare chunks and batches: give a longer one"
        )
    steps = min(_CONTINUATION_TOKENS, *(len(row) - 1 for row in others))
    batch = (long[: len(long) * 2 // 3], *others)
    whole = TokenRow(token_ids=tuple(long), positions=spread(len(long), vocab_size))
    return (whole, *(_continued(row, steps) for row in batch))


def spread(num_tokens: int, vocab_size: int) -> tuple[int, ...]:
    """Return the positions of a text that are compared: all, or as many as memory allows.

    Then they are evenly spaced, the first and the last among them.
    """
    count = min(num_tokens, max(2, _MAX_LOGITS_BYTES // (4 * vocab_size)))
    return tuple(int(p) for p in np.linspace(0, num_tokens - 1, count).round())


def describe_rows(config: GemmaConfig, rows: Sequence[TokenRow], asked_tokens: int) -> str:
    """Return how long the text is, and whether that shows a sliding window to be right."""
    text = rows[0]
    read = len(text.token_ids)
    short = "" if read == asked_tokens else f" of the {asked_tokens} asked for"
    said = f"{read} tokens{short} are read, {len(text.positions)} positions of them compared"
    windows = [config.window_of(layer) for layer in range(config.num_hidden_layers)]
    window = next((window for window in windows if window is not None), None)
    if window is None:
        return said
    if read > window:
        return f"{said}; they pass the sliding window of {window} tokens"
    return (
        f"{said}; they do NOT pass the sliding window of {window} tokens, which stays untested: "
        f"--tokens {math.ceil(window * 1.25)} tests it"
    )


def _repeated(tokenizer: GemmaTokenizer, num_tokens: int) -> list[int]:
    """Return the tokens of our own text, repeated until there are enough."""
    text = verify_text.TEXT
    while len(token_ids := tokenizer.encode(text)) < num_tokens:
        text += text
    return token_ids


def _continued(token_ids: Sequence[int], steps: int) -> TokenRow:
    """Return a row whose last `steps` tokens are read one at a time."""
    first = len(token_ids) - 1 - steps
    return TokenRow(token_ids=tuple(token_ids), positions=tuple(range(first, len(token_ids))))

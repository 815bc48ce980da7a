"""Text to rows of tokens, for calibration and for judging it: `token_rows`."""

from importlib import resources

import torch
from torch import Tensor

from gemma_deploy.errors import RequestError
from gemma_deploy.tokenizer import GemmaTokenizer

_DEFAULT_TEXT_FILE = "default_text.txt"
_HELD_OUT_TEXT_FILE = "held_out_text.txt"


def default_text() -> str:
    """Return the built-in text: prose, talk, code, numbers and tables in a dozen languages."""
    return _built_in(_DEFAULT_TEXT_FILE)


def held_out_text() -> str:
    """Return a built-in text of the same kinds that calibration never reads."""
    return _built_in(_HELD_OUT_TEXT_FILE)


def token_rows(
    tokenizer: GemmaTokenizer,
    text: str | None,
    *,
    row_tokens: int,
    min_tokens: int,
    max_tokens: int,
    vocab_size: int,
    is_from_end: bool = False,
) -> Tensor:
    """Cut a text into rows, each beginning with `<bos>` as the model has it.

    Args:
        tokenizer: The model's.
        text: Any text; None for the built-in one.
        row_tokens: S, most tokens of a row, `<bos>` included.
        min_tokens: Fewest tokens that are of use.
        max_tokens: Most that are read; the rest of the text is left out.
        vocab_size: V, tokens that the model has embeddings of.
        is_from_end: Whether the text's end is read, and its beginning left out.

    Returns:
        int64 [R, S], R * S <= max(max_tokens, S); what does not fill a row is left out. A text of
        less than a row is one shorter row.

    Raises:
        RequestError: The text has fewer than `min_tokens` tokens, or tokens that the model has no
            embedding of.
    """
    source = default_text() if text is None else text
    bos = tokenizer.bos_token_id
    ids = torch.tensor(tokenizer.encode(source, add_bos=False), dtype=torch.int64)
    if len(ids) < min_tokens:
        raise RequestError(
            f"the {'built-in' if text is None else 'calibration'} text has {len(ids)} tokens of this "
            f"model; at least {min_tokens} are needed: give a longer text"
        )
    head = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    body_tokens = min(row_tokens - len(head), len(ids))
    num_rows = max(1, min(len(ids) // body_tokens, max_tokens // (body_tokens + len(head))))
    read_tokens = num_rows * body_tokens
    body = ids[-read_tokens:] if is_from_end else ids[:read_tokens]
    rows = torch.cat((head.expand(num_rows, -1), body.view(num_rows, body_tokens)), dim=1)
    if int(rows.max()) >= vocab_size:
        raise RequestError(
            f"the text has token {int(rows.max())}, and the model has embeddings of {vocab_size}: use the "
            "tokenizer that belongs to the model and a text without such tokens, or export with "
            "--no-calibration, which reads none"
        )
    return rows


def _built_in(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

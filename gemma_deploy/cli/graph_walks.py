"""The ways a bundle's graphs may be walked through a text; each must give the same logits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np

from gemma_deploy.parity import FloatArray, TokenRow

if TYPE_CHECKING:
    from gemma_deploy.runtime.sessions.session import Int64Array, KVCache, Session

Walk = Callable[["Session", Sequence[TokenRow]], Iterator[FloatArray]]

_CHUNK_TOKENS = 48  # shorter than the text, and no divisor of it: the last chunk is a short one


def whole(session: "Session", rows: Sequence[TokenRow]) -> Iterator[FloatArray]:
    """Read each text in one step of the prefill graph."""
    return _in_chunks(session, rows, max(len(row.token_ids) for row in rows))


def chunked(session: "Session", rows: Sequence[TokenRow]) -> Iterator[FloatArray]:
    """Read each text in chunks: the prefill graph continues what the cache holds."""
    return _in_chunks(session, rows, _CHUNK_TOKENS)


def stepwise(session: "Session", rows: Sequence[TokenRow]) -> Iterator[FloatArray]:
    """Read each text token by token: every step is one of the decode graph."""
    return _in_chunks(session, rows, 1)


def ragged(session: "Session", rows: Sequence[TokenRow]) -> Iterator[FloatArray]:
    """Read all texts at once, padded on the right, then continue all of them token by token.

    Each row is read up to its first position at once; from there on, one token of every row is a
    step of the decode graph at a position of the row's own. Rows have as many positions as each
    other, one after the other.
    """
    cache = session.new_cache(len(rows), max(len(row.token_ids) for row in rows))
    starts = np.array([row.positions[0] for row in rows], np.int64)
    input_ids = np.zeros((len(rows), int(starts.max()) + 1), np.int64)
    for index, row in enumerate(rows):
        input_ids[index, : starts[index] + 1] = row.token_ids[: starts[index] + 1]
    none_cached = np.zeros(len(rows), np.int64)
    found = [_step(session, input_ids, none_cached, starts[:, None], cache)]
    for offset in range(1, len(rows[0].positions)):
        tokens = [[row.token_ids[row.positions[offset]]] for row in rows]
        first = np.zeros((len(rows), 1), np.int64)
        found.append(_step(session, np.array(tokens, np.int64), starts + offset, first, cache))
    logits = np.concatenate(found, axis=1)
    return iter(logits)


def ragged_chunks(session: "Session", rows: Sequence[TokenRow]) -> Iterator[FloatArray]:
    """Read all texts but their last tokens, then these: one step continues rows of all lengths."""
    starts = np.array([row.positions[0] for row in rows], np.int64)
    count = len(rows[0].positions)
    cache = session.new_cache(len(rows), int(starts.max()) + count)
    head = np.zeros((len(rows), max(1, int(starts.max()))), np.int64)
    for number, row in enumerate(rows):
        head[number, : starts[number]] = row.token_ids[: starts[number]]
    first = np.zeros((len(rows), 1), np.int64)
    _step(session, head, np.zeros(len(rows), np.int64), first, cache)
    tail = np.array([[row.token_ids[p] for p in row.positions] for row in rows], np.int64)
    index = np.tile(np.arange(count, dtype=np.int64), (len(rows), 1))
    return iter(_step(session, tail, starts, index, cache))


def _in_chunks(
    session: "Session", rows: Sequence[TokenRow], chunk_tokens: int
) -> Iterator[FloatArray]:
    for row in rows:
        cache = session.new_cache(1, len(row.token_ids))
        found = []
        for start in range(0, len(row.token_ids), chunk_tokens):
            chunk = np.array([row.token_ids[start : start + chunk_tokens]], np.int64)
            wanted = [p - start for p in row.positions if 0 <= p - start < chunk.shape[1]]
            # A step gives at least one position's logits; one that nobody asked for is dropped.
            index = np.array([wanted or [0]], np.int64)
            logits = _step(session, chunk, np.array([start], np.int64), index, cache)
            found.append(logits[0, : len(wanted)])
        yield np.concatenate(found)


def _step(
    session: "Session",
    input_ids: "Int64Array",
    input_pos: "Int64Array",
    logits_index: "Int64Array",
    cache: "KVCache",
) -> FloatArray:
    # The session writes its next logits into the same memory.
    logits: FloatArray = np.array(
        session.step(input_ids, input_pos, logits_index, cache).logits, copy=True
    )
    return logits


TEXT_WALKS: Final[Mapping[str, Walk]] = MappingProxyType(
    {
        "prefill graph, whole text": whole,
        "prefill graph, in chunks": chunked,
        "decode graph, token by token": stepwise,
    }
)
BATCH_WALKS: Final[Mapping[str, Walk]] = MappingProxyType(
    {
        "both graphs, ragged batch": ragged,
        "prefill graph, ragged batch in chunks": ragged_chunks,
    }
)

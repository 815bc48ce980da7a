"""The logits of a text's tokens, in pieces that fit memory: `TextLogits`."""

from collections.abc import Iterator

import array_api_compat
import numpy as np
import numpy.typing as npt

from gemma_deploy.runtime.sessions.session import Array, Int64Array, Session

# float32 logits of one step: 64 positions of 262,144 tokens.
_PIECE_BYTES = 1 << 26
_MAX_PIECE_TOKENS = 512

FloatArray = npt.NDArray[np.float32]


class TextLogits:
    """Reads texts with a session, one after the other, each from an empty cache.

    Args:
        session: What runs the steps; it stays the caller's.
        max_tokens: Most tokens of a text.
        piece_tokens: Most tokens of a step; None for what keeps its logits under 64 MiB.

    Raises:
        RequestError: `max_tokens` is beyond the session's limits.
        SessionError: There is not enough memory for the cache.
    """

    def __init__(
        self, session: Session, max_tokens: int, *, piece_tokens: int | None = None
    ) -> None:
        self._session = session
        self._cache = session.new_cache(1, max_tokens)
        self.piece_tokens = piece_tokens or piece_size(session)

    def pieces(self, token_ids: Int64Array, first: int = 0) -> Iterator[FloatArray]:
        """Yield the logits after each token from index `first` on, in pieces [P, V].

        The pieces of two sessions with the same `piece_tokens` are of the same positions.

        Args:
            token_ids: int64 [S], what is read.
            first: Index of the first token after which logits are wanted.

        Yields:
            float32 [P, V], in memory that the next step may write again.

        Raises:
            SessionError: The backend failed.
        """
        for start in range(0, len(token_ids), self.piece_tokens):
            piece = token_ids[start : start + self.piece_tokens]
            wanted = np.arange(max(first - start, 0), len(piece), dtype=np.int64)
            # A step gives at least one position's logits; one that nobody asked for is dropped.
            index = wanted if len(wanted) else np.zeros(1, np.int64)
            step = self._session.step(
                piece[None, :], np.array([start], np.int64), index[None, :], self._cache
            )
            if len(wanted):
                yield _on_host(step.logits[0])


def piece_size(*sessions: Session) -> int:
    """Return how many tokens a step of each of these sessions may have."""
    sizes = [_MAX_PIECE_TOKENS]
    for session in sessions:
        limits = session.limits
        sizes.append(max(1, _PIECE_BYTES // (4 * session.config.vocab_size)))
        sizes += [size for size in (limits.max_step_tokens, limits.max_step_logits) if size]
    return min(sizes)


def _on_host(logits: Array) -> FloatArray:
    return np.asarray(array_api_compat.to_device(logits, "cpu"))

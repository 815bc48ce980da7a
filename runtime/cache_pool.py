"""KV caches for batches that may be open at the same time: `CachePool`."""

import contextlib
from collections import deque

from gemma_deploy.runtime.sessions.session import KVCache, Session


class CachePool:
    """Gives every batch a KV cache of its own, and keeps one that is idle for the next.

    Args:
        session: Whose caches they are.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        # A batch that the garbage collector ends gives its cache back in whatever thread it happens to
        # run in, perhaps one in the middle of a step: no lock here, only operations that are atomic.
        self._idle: deque[KVCache] = deque(maxlen=1)

    def take(self, batch_size: int, max_seq_len: int) -> KVCache:
        """Return a cache of at least this size that no other batch has; no step may run meanwhile.

        An idle one that is too small is freed before its successor is allocated.

        Raises:
            SessionError: There is not enough memory.
        """
        idle = self._take_idle()
        if idle is not None and idle.batch_size >= batch_size and idle.max_seq_len >= max_seq_len:
            return idle
        del idle
        return self._session.new_cache(batch_size, max_seq_len)

    def give_back(self, cache: KVCache) -> None:
        """Keep a cache for the next batch, unless a larger one is idle already."""
        idle = self._take_idle()
        is_larger = idle is not None and _num_tokens(idle) > _num_tokens(cache)
        self._idle.append(idle if idle is not None and is_larger else cache)

    def free(self) -> None:
        """Let go of the idle cache."""
        self._idle.clear()

    def _take_idle(self) -> KVCache | None:
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        return None


def _num_tokens(cache: KVCache) -> int:
    return cache.batch_size * cache.max_seq_len

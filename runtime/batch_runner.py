"""Batches that take turns in one KV cache: `BatchRunner`."""

from collections.abc import Callable, Collection, Generator, Sequence

from gemma_deploy.errors import GemmaDeployError
from gemma_deploy.runtime.capacity import cache_capacity, check_token_ids
from gemma_deploy.runtime.generator import BatchGeneration
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions.session import KVCache, Session


class BatchRunner:
    """Keeps a KV cache from one batch to the next, as long as it is large enough.

    A new batch cancels the one before it, whose tokens it overwrites.
    """

    def __init__(
        self, session: Session, *, max_seq_len: int | None, limit: int, prefill_chunk: int
    ) -> None:
        """Prepare; nothing is allocated yet.

        Args:
            session: What runs the steps.
            max_seq_len: Capacity of the cache, in tokens; None for what each call needs, or for the
                session's where that is fixed.
            limit: Longest sequence the model and the session are made for, in tokens.
            prefill_chunk: Most tokens of a prompt in one step, where the session takes as many.
        """
        limits = session.limits
        self._session = session
        self._max_seq_len = limits.max_seq_len if max_seq_len is None else max_seq_len
        self._limit = limit
        self._prefill_chunk = min(prefill_chunk, limits.max_step_tokens or prefill_chunk)
        self._cache: KVCache | None = None
        self._batch: BatchGeneration | None = None

    def capacity(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> int:
        """Check a call's prompts; return how many tokens a row must hold in all its batches.

        Raises:
            RequestError: An empty prompt, or token ids the model does not have.
            PromptTooLongError: A prompt that does not fit.
        """
        check_token_ids(prompts, self._session.config.vocab_size)
        return cache_capacity(
            prompts, options.max_new_tokens, max_seq_len=self._max_seq_len, limit=self._limit
        )

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        capacity: int,
        *,
        stop_token_ids: Collection[int],
        first_row: int = 0,
    ) -> BatchGeneration:
        """Cancel the batch before and return a new one that has not run yet.

        Args:
            prompts: Token ids of each row.
            options: How to choose tokens and when to stop.
            capacity: Tokens a row must hold.
            stop_token_ids: Tokens that end a row.
            first_row: Number of the first row among all rows of the call.

        Raises:
            SessionError: There is not enough memory for the cache.
        """
        if self._batch is not None:
            self._batch.cancel()
        self._batch = BatchGeneration(
            self._session,
            self._cache_for(len(prompts), capacity),
            prompts,
            options,
            stop_token_ids=stop_token_ids,
            first_row=first_row,
            prefill_chunk=self._prefill_chunk,
        )
        return self._batch

    def steps(
        self, batch: BatchGeneration, is_cancelled: Callable[[], bool]
    ) -> Generator[list[int]]:
        """Run a batch's steps; after an error the cache is not used again."""
        try:
            yield from batch.steps(is_cancelled)
        except GemmaDeployError:
            # The step may have left NaN in the cache: a masked position's zero weight times NaN is NaN.
            self.free()
            raise

    def run(self, batch: BatchGeneration, is_cancelled: Callable[[], bool]) -> bool:
        """Run a batch to its end; return whether it was cancelled, by Ctrl-C too."""
        try:
            for _ in self.steps(batch, is_cancelled):
                pass
        except KeyboardInterrupt:
            batch.cancel()
        return any(row.finish_reason == "cancelled" for row in batch.rows)

    def free(self) -> None:
        """Let go of the cache."""
        self._cache = self._batch = None

    def _cache_for(self, batch_size: int, capacity: int) -> KVCache:
        """Return rows of the cache of earlier calls where they suffice, of a new one otherwise."""
        if self._cache is not None and not (
            self._cache.batch_size >= batch_size and self._cache.max_seq_len >= capacity
        ):
            self.free()  # before its successor is allocated
        if self._cache is None:
            self._cache = self._session.new_cache(batch_size, capacity)
        return self._cache.rows(0, batch_size)

"""Batches of several threads on one session, a step at a time: `BatchRunner`."""

import contextlib
from collections.abc import Callable, Collection, Generator, Sequence

from gemma_deploy.errors import GemmaDeployError, SessionError
from gemma_deploy.runtime.cache_pool import CachePool
from gemma_deploy.runtime.capacity import cache_capacity, check_token_ids
from gemma_deploy.runtime.generator import BatchGeneration, never
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions.session import KVCache, Session
from gemma_deploy.runtime.turns import Turns

OnProgress = Callable[[int, int], object]
"""Called with the prompts' tokens that are read and with how many there are."""


def ignore(_done: int, _total: int) -> None:
    """Do nothing: the progress that nobody follows."""


class BatchRunner:
    """Runs batches, each in a KV cache of its own; safe to use from several threads.

    A step writes its logits where the next one does, so a step and the choice of tokens from its
    logits are one unit: threads take turns at these units in `steps`, and at whole batches in `run`.

    Attributes:
        max_batch_size: Most rows of a batch; None for any number.
    """

    def __init__(
        self, session: Session, *, max_seq_len: int | None, limit: int, prefill_chunk: int
    ) -> None:
        """Prepare; nothing is allocated yet.

        Args:
            session: What runs the steps; nothing else may run steps of it meanwhile.
            max_seq_len: Capacity of the cache, in tokens; None for what each call needs, or for the
                session's where that is fixed.
            limit: Longest sequence the model and the session are made for, in tokens.
            prefill_chunk: Most tokens of a prompt in one step, where the session takes as many.
        """
        limits = session.limits
        self.max_batch_size = limits.max_batch_size
        self._session = session
        self._max_seq_len = limits.max_seq_len if max_seq_len is None else max_seq_len
        self._limit = limit
        self._prefill_chunk = min(prefill_chunk, limits.max_step_tokens or prefill_chunk)
        self._caches = CachePool(session)
        self._turns = Turns()
        self._is_closed = False

    def capacity(self, prompts: Sequence[Sequence[int]], options: GenerationOptions) -> int:
        """Check a call's prompts; return how many tokens a row must hold in all its batches.

        Raises:
            RequestError: An empty prompt, or token ids the model does not have; or a prompt that
                leaves no room in `options.max_length`.
            PromptTooLongError: A prompt that does not fit.
            SessionError: The runner is closed.
        """
        self._check_open()
        check_token_ids(prompts, self._session.config.vocab_size)
        return cache_capacity(prompts, options, max_seq_len=self._max_seq_len, limit=self._limit)

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        capacity: int,
        *,
        stop_token_ids: Collection[int],
        first_row: int = 0,
    ) -> BatchGeneration:
        """Return a batch that has not run yet; it has a cache from its first step to its last.

        Args:
            prompts: Token ids of each row.
            options: How to choose tokens and when to stop.
            capacity: Tokens a row must hold.
            stop_token_ids: Tokens that end a row.
            first_row: Number of the first row among all rows of the call.
        """
        return BatchGeneration(
            self._session,
            None,
            prompts,
            options,
            max_seq_len=capacity,
            stop_token_ids=stop_token_ids,
            first_row=first_row,
            prefill_chunk=self._prefill_chunk,
        )

    def steps(
        self,
        batch: BatchGeneration,
        is_cancelled: Callable[[], bool] = never,
        on_progress: OnProgress = ignore,
    ) -> Generator[list[int]]:
        """Run a batch as `BatchGeneration.steps` does, one turn for each step.

        Args:
            batch: From `start`.
            is_cancelled: Asked before each step.
            on_progress: Called before the first step and after each that reads a part of the prompts.

        Raises:
            NonFiniteLogitsError: The model put out NaN or infinity.
            SessionError: The backend failed, there is not enough memory for the cache, or the runner
                was closed.
        """
        steps = batch.single_steps(is_cancelled)
        cache: KVCache | None = None
        try:
            with contextlib.suppress(KeyboardInterrupt):
                on_progress(0, batch.num_prompt_tokens)
                with self._turn():
                    cache = self._caches.take(len(batch.rows), batch.max_seq_len)
                    batch.cache = cache.rows(0, len(batch.rows))
                is_reading = True
                while (active := self._next(steps)) is not None:
                    if is_reading:
                        on_progress(batch.num_read_tokens, batch.num_prompt_tokens)
                    if active:
                        is_reading = False
                        yield active
        except GemmaDeployError:
            # The step may have left NaN in the cache: a masked position's zero weight times NaN is NaN.
            cache = None
            raise
        finally:
            steps.close()
            batch.cancel()
            batch.cache = None
            if cache is not None and not self._is_closed:
                self._caches.give_back(cache)

    def run(
        self,
        batch: BatchGeneration,
        is_cancelled: Callable[[], bool] = never,
        on_progress: OnProgress = ignore,
    ) -> bool:
        """Run a batch to its end in one turn; return whether it was cancelled, by Ctrl-C too."""
        try:
            with self._turns.taken():
                for _ in self.steps(batch, is_cancelled, on_progress):
                    pass
        except KeyboardInterrupt:
            batch.cancel()
        return any(row.finish_reason == "cancelled" for row in batch.rows)

    def is_inside(self) -> bool:
        """Whether this thread runs a step or a batch, and this is a callback of it."""
        return self._turns.is_held()

    def free(self) -> None:
        """Let go of the cache that is idle."""
        self._caches.free()

    def close(self) -> None:
        """Close the session once the step that runs has ended; other steps are refused from now on."""
        self._is_closed = True
        with self._turns.taken():
            self._caches.free()
            self._session.close()

    def _next(self, steps: Generator[list[int]]) -> list[int] | None:
        """Run one step and choose from its logits; return None after the last one."""
        with self._turn():
            return next(steps, None)

    @contextlib.contextmanager
    def _turn(self) -> Generator[None]:
        """Have the session to oneself.

        Raises:
            SessionError: The runner is closed.
        """
        with self._turns.taken():
            self._check_open()
            yield

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionError("the model is closed: load it again")

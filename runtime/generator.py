"""Prefill and the decode loop over one batch of prompts, above every backend."""

import contextlib
import secrets
from collections.abc import Callable, Collection, Generator, Sequence
from functools import partial

import numpy as np

from gemma_deploy.errors import NonFiniteLogitsError
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.rows import Row
from gemma_deploy.runtime.sampling import (
    RepetitionPenalty,
    highest_if_finite,
    sampling_method,
)
from gemma_deploy.runtime.sessions.session import (
    Array,
    Int64Array,
    KVCache,
    Session,
    StepLogits,
)

PREFILL_CHUNK_TOKENS = 512


def never() -> bool:
    """Return False: what cancels a generation that nothing cancels."""
    return False


class BatchGeneration:
    """The state of one batch between its prompts and its last token.

    Each row depends on nothing but its own prompt, options and number: a row of a batch gets the text
    it would get alone, up to the rounding of the backend's kernels.

    Attributes:
        rows: One for each prompt, in their order.
        cache: Where keys and values are; None where there is no step to come.
        max_seq_len: Most tokens of a row in the cache.
    """

    def __init__(  # noqa: PLR0913  # a keyword for each decision
        self,
        session: Session,
        cache: KVCache | None,
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        max_seq_len: int | None = None,
        stop_token_ids: Collection[int] = (),
        first_row: int = 0,
        prefill_chunk: int = PREFILL_CHUNK_TOKENS,
    ) -> None:
        """Prepare a batch; nothing runs yet.

        Args:
            session: What runs the steps.
            cache: Of as many rows as there are prompts, each long enough for its prompt; its
                contents are overwritten. None if `cache` is set before the first step.
            prompts: B lists of token ids, none empty, each id below V.
            options: How to choose tokens and when to stop; what is None is as
                `GenerationOptions` has it for a model that says nothing of its own.
            max_seq_len: Most tokens of a row in the cache; None for all that fit.
            stop_token_ids: Tokens that end a row.
            first_row: Number of the first row among all rows of the call, from 0; with the seed it
                decides the random numbers. Errors count from 1.
            prefill_chunk: Most tokens of a row in one step, which bounds the activations' memory.
        """
        if max_seq_len is None:
            if cache is None:
                raise ValueError("a batch without a cache needs max_seq_len")
            max_seq_len = cache.max_seq_len
        self.cache = cache
        self.max_seq_len = max_seq_len
        self._session = session
        self._stop_token_ids = frozenset(stop_token_ids)
        self._first_row = first_row
        self._prefill_chunk = prefill_chunk
        self._method = sampling_method(options)
        penalty = options.repetition_penalty
        self._penalty = None if penalty in (None, 1) else RepetitionPenalty(penalty)
        # A penalty may lift any token into the largest.
        self._num_candidates = self._method.num_candidates if self._penalty is None else None
        seed = secrets.randbits(64) if options.seed is None else options.seed
        self.rows = [
            Row(
                prompt,
                # The last token needs no place in the cache: nothing is read after it.
                min(max_seq_len + 1, len(prompt) + options.most_new_tokens(len(prompt))),
                np.random.default_rng([seed, number]),
            )
            for number, prompt in enumerate(prompts, start=first_row)
        ]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(row.prompt_length for row in self.rows)

    @property
    def num_read_tokens(self) -> int:
        """Tokens of the prompts that were read so far."""
        return sum(min(row.num_cached, row.prompt_length) for row in self.rows)

    def steps(self, is_cancelled: Callable[[], bool] = never) -> Generator[list[int]]:
        """Run the batch; after each new token yield the indexes of the rows that got one.

        However it ends (to the end, `is_cancelled` returning True, Ctrl-C, the iterator closed), every
        row then has a finish reason and keeps the tokens it got.

        Args:
            is_cancelled: Asked before each step.

        Raises:
            NonFiniteLogitsError: The model put out NaN or infinity.
            SessionError: The backend failed.
        """
        with contextlib.closing(self.single_steps(is_cancelled)) as steps:
            yield from filter(None, steps)

    def single_steps(self, is_cancelled: Callable[[], bool] = never) -> Generator[list[int]]:
        """As `steps`, but also yield, an empty list, after each chunk of a long prompt.

        Between two items nothing is kept in the session's memory: it may run other steps there.
        """
        try:
            with contextlib.suppress(KeyboardInterrupt):
                yield from self._steps(is_cancelled)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End every row that has not ended."""
        for row in self.rows:
            row.finish("cancelled")

    def _steps(self, is_cancelled: Callable[[], bool]) -> Generator[list[int]]:
        for row in self.rows:
            row.start()
        logits = yield from self._prefill(is_cancelled)
        while logits is not None and (active := self._active()):
            self._append(active, logits)
            yield active
            logits = None if self._is_over(is_cancelled) else self._decode()

    def _active(self) -> list[int]:
        return [index for index, row in enumerate(self.rows) if row.finish_reason is None]

    def _is_over(self, is_cancelled: Callable[[], bool]) -> bool:
        return not self._active() or is_cancelled()

    def _prefill(
        self, is_cancelled: Callable[[], bool]
    ) -> Generator[list[int], None, StepLogits | None]:
        """Run the prompts; return each row's logits at its last token, None if cancelled."""
        longest = max(row.prompt_length for row in self.rows)
        if longest > self._prefill_chunk:
            return (yield from self._prefill_in_chunks(is_cancelled))
        if self._is_over(is_cancelled):
            return None
        # Padded with the row's own last token: a stranger's key or value may be NaN, and NaN gets
        # through a mask as zero weight times NaN.
        input_ids = np.array([[row.last_token] * longest for row in self.rows], np.int64)
        for index, row in enumerate(self.rows):
            input_ids[index, : row.prompt_length] = row.sequence
            row.num_cached = row.prompt_length
        last = np.array([[row.prompt_length - 1] for row in self.rows], np.int64)
        start = np.zeros(len(self.rows), np.int64)
        return self._step(input_ids, start, last)

    def _prefill_in_chunks(
        self, is_cancelled: Callable[[], bool]
    ) -> Generator[list[int], None, StepLogits | None]:
        """Run each row by itself, one chunk after the other.

        All logits of a row's last chunk are taken: rows with all and rows with the largest, which ties
        may make of them, could not be put together, and beside several chunks they cost nothing.
        """
        xp = self._session.xp
        last_logits = []
        for index, row in enumerate(self.rows):
            cache = self._batch_cache().rows(index, index + 1)
            while row.num_cached < row.prompt_length:
                if self.num_read_tokens:
                    yield []
                if self._is_over(is_cancelled):
                    return None
                chunk = row.sequence[None, row.num_cached :][:, : self._prefill_chunk]
                start = np.array([row.num_cached], np.int64)
                last = np.array([[chunk.shape[1] - 1]], np.int64)
                is_last = row.num_cached + chunk.shape[1] == row.prompt_length
                wanted = None if is_last else 1
                found = self._session.step(chunk, start, last, cache, num_candidates=wanted)
                row.num_cached += chunk.shape[1]
                if is_last:
                    # The session's next step writes into the same memory.
                    last_logits.append(xp.asarray(found.logits, copy=True))
        return StepLogits(xp.concat(last_logits, axis=0))

    def _batch_cache(self) -> KVCache:
        if self.cache is None:
            raise ValueError("the batch has no cache: set it before the first step")
        return self.cache

    def _decode(self) -> StepLogits:
        """Run one token of each row; return the logits.

        A row that has ended stays in the batch at position 0, which costs the least.
        """
        going_on = [row.finish_reason is None for row in self.rows]
        starts = [row.num_cached if go else 0 for row, go in zip(self.rows, going_on, strict=True)]
        found = self._step(
            np.array([[row.last_token] for row in self.rows], np.int64),
            np.array(starts, np.int64),
            np.zeros((len(self.rows), 1), np.int64),
        )
        for row in self.rows:
            row.num_cached += 1
        return found

    def _step(
        self, input_ids: Int64Array, input_pos: Int64Array, logits_index: Int64Array
    ) -> StepLogits:
        """Run a step of the batch, for the largest logits where they decide and for all otherwise."""
        run = partial(self._session.step, input_ids, input_pos, logits_index, self._batch_cache())
        found = run(num_candidates=self._num_candidates)
        if found.token_ids is None or all(
            self._method.is_decided_by(found.logits[index, 0, :]) for index in self._active()
        ):
            return found
        return run(num_candidates=None)

    def _append(self, active: list[int], found: StepLogits) -> None:
        """Choose a token for each active row from what the step found, and end rows that are done."""
        rows = [self.rows[index] for index in active]
        logits = self._of_rows(found.logits, active)
        token_ids = None if found.token_ids is None else self._of_rows(found.token_ids, active)
        highest: list[int] | None = self._highest(logits, active)
        if self._penalty is not None:
            logits, highest = self._penalty(logits, [row.sequence for row in rows]), None
        # Drawn where the method asks for them.
        uniforms = (row.random.random() for row in rows)
        chosen = self._method(logits, uniforms, token_ids, highest=highest)
        for row, token_id in zip(rows, chosen, strict=True):
            row.append(token_id)
            if token_id in self._stop_token_ids:
                row.finish("stop")
            elif row.is_full:
                row.finish("length")

    def _of_rows(self, array: Array, active: list[int]) -> Array:
        """Return [len(active), C] of an array [B, 1, C]."""
        if len(active) == len(self.rows):
            return array[:, 0, :]
        return self._session.xp.stack([array[index, 0, :] for index in active])

    def _highest(self, logits: Array, active: list[int]) -> list[int]:
        """Return the index of each active row's highest logit.

        Raises:
            NonFiniteLogitsError: One of the logits is NaN or infinite.
        """
        highest = highest_if_finite(logits)
        finite = [index for index in highest if index is not None]
        if len(finite) == len(active):
            return finite
        index = active[highest.index(None)]
        row = self.rows[index]
        raise NonFiniteLogitsError(
            f"the model put out NaN or infinity for prompt {self._first_row + index + 1}, new token "
            f"{row.num_new_tokens + 1} (after {len(row.sequence)} tokens of sequence): no token can "
            "be chosen. A float16 model most likely overflowed: export it with --dtype bfloat16 or "
            "float32. Otherwise the checkpoint's weights or the input are at fault: check with "
            "`gemma-deploy verify`"
        )

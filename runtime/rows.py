"""One prompt of a batch on its way to text: `Row`."""

import time
from collections.abc import Sequence

import numpy as np

from gemma_deploy.runtime.metrics import Timings
from gemma_deploy.runtime.result import FinishReason
from gemma_deploy.runtime.sessions.session import Int64Array


class Row:
    """What the loop knows of one row of the batch.

    Attributes:
        prompt_length: Tokens of the prompt.
        num_cached: Tokens the row has in the KV cache.
        finish_reason: None while the row goes on.
        random: The row's own random numbers: its text does not depend on its neighbours.
    """

    def __init__(self, prompt: Sequence[int], capacity: int, random: np.random.Generator) -> None:
        """Prepare a row; its time begins with `start`.

        Args:
            prompt: Token ids.
            capacity: Most tokens the row can come to, prompt included.
            random: Where the row's random numbers come from.
        """
        self.prompt_length = len(prompt)
        self.num_cached = 0
        self.finish_reason: FinishReason | None = None
        self.random = random
        self._capacity = capacity
        self._sequence = np.empty(max(capacity, len(prompt)), np.int64)
        self._sequence[: len(prompt)] = prompt
        self._length = len(prompt)
        self._started_s: float | None = None
        self._first_token_s: float | None = None
        self._ended_s: float | None = None

    @property
    def sequence(self) -> Int64Array:
        """The prompt and what was generated, int64 [n]; a view that `append` leaves as it is."""
        return self._sequence[: self._length]

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated so far."""
        return self._length - self.prompt_length

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """The tokens generated so far."""
        return tuple(self.sequence[self.prompt_length :].tolist())

    @property
    def is_full(self) -> bool:
        """Whether the row has come to the most tokens it can."""
        return self._length >= self._capacity

    @property
    def last_token(self) -> int:
        """The sequence's last token."""
        return int(self._sequence[self._length - 1])

    def start(self) -> None:
        """Note that the row's first step begins."""
        self._started_s = time.perf_counter()

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self._sequence[self._length] = token_id
        self._length += 1
        self._ended_s = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s = self._ended_s

    def finish(self, reason: FinishReason) -> None:
        """End the row, unless it has ended."""
        if self.finish_reason is None:
            self.finish_reason = reason
            if self._first_token_s is None:
                self._ended_s = time.perf_counter()

    def timings(self) -> Timings:
        """Return how long the row took to its last token: what came after it was waiting.

        A row without a token took until it was ended.
        """
        return Timings(
            prompt_tokens=self.prompt_length,
            new_tokens=self.num_new_tokens,
            ttft_s=self._since_start(self._first_token_s),
            total_s=self._since_start(self._ended_s) or 0.0,
        )

    def _since_start(self, time_s: float | None) -> float | None:
        return None if time_s is None or self._started_s is None else time_s - self._started_s

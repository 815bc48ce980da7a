"""What every backend does: `Session` runs one step, `KVCache` is the memory between steps."""

from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import SessionError
from gemma_deploy.runtime.devices import Device

Int64Array = npt.NDArray[np.int64]
Array = Any
"""An array of the session's array library, `Session.xp`."""


class KVCache(Protocol):
    """Keys and values of `batch_size` rows of up to `max_seq_len` tokens, written in place."""

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Tokens that fit a row."""
        ...

    def rows(self, start: int, stop: int) -> Self:
        """Return a cache of the rows start, ..., stop - 1 that shares this one's memory."""
        ...


_Cache = TypeVar("_Cache")


def own_cache(cache: KVCache, kind: type[_Cache]) -> _Cache:
    """Return the cache, which must be of the kind that the session allocates.

    Raises:
        SessionError: It is another session's.
    """
    if not isinstance(cache, kind):
        raise SessionError(
            f"cache is a {type(cache).__name__}; expected one from this session's new_cache"
        )
    return cache


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """What a session cannot go beyond; None where it is made for any size.

    Attributes:
        max_batch_size: Most rows of a step.
        max_seq_len: Most tokens of a row in the KV cache.
        max_step_tokens: Most tokens of a row in one step.
        max_step_logits: Most positions of a row whose logits one step gives.
    """

    max_batch_size: int | None = None
    max_seq_len: int | None = None
    max_step_tokens: int | None = None
    max_step_logits: int | None = None


@dataclass(frozen=True, slots=True)
class StepLogits:
    """Logits of the whole vocabulary, or the largest of them.

    Attributes:
        logits: float32 [B, L, C]. A position with a logit that is NaN or infinite has one among these.
        token_ids: int64 [B, L, C], whose logits they are, in any order; None if C is V and they are
            those of the tokens 0, 1, ..., V - 1.
    """

    logits: Array
    token_ids: Array | None = None


class Session(Protocol):
    """A loaded model that runs one step at a time.

    Steps may be of different caches in turn, and of different threads, but never two at a time; nor may
    a cache be allocated during a step.
    """

    @property
    def config(self) -> GemmaConfig:
        """The model."""
        ...

    @property
    def device(self) -> Device:
        """What the model runs on, `cpu` or `cuda`."""
        ...

    @property
    def xp(self) -> Any:
        """The array library of the logits, as array-api-compat gives it."""
        ...

    @property
    def limits(self) -> SessionLimits:
        """What the session cannot go beyond."""
        ...

    def new_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """Allocate a cache.

        Raises:
            RequestError: It is larger than `limits` allow.
            SessionError: There is not enough memory.
        """
        ...

    def step(
        self,
        input_ids: Int64Array,
        input_pos: Int64Array,
        logits_index: Int64Array,
        cache: KVCache,
        *,
        num_candidates: int | None = None,
    ) -> StepLogits:
        """Run S tokens of each row and write their keys and values into the cache.

        Rows shorter than S are padded on the right with any token; what the padding wrote is
        overwritten by the row's next token and never seen before that. The same step run again writes
        the same and gives the same.

        Args:
            input_ids: int64 [B, S], each below V.
            input_pos: int64 [B], tokens each row has in the cache already; input_pos + S <= T.
            logits_index: int64 [B, L], the positions among the S whose logits are wanted.
            cache: Of B rows, from this session's `new_cache`.
            num_candidates: How many of the largest logits suffice; None for all. A session may give
                more, or all.

        Returns:
            Logits in memory that the next step may write again.

        Raises:
            RequestError: The step is larger than `limits` allow.
            SessionError: The backend failed, or the cache is not one of this session's.
        """
        ...

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        ...

"""What every backend does: `Session` runs one step, `KVCache` is the memory between steps."""

from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from gemma_deploy.config import GemmaConfig

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


class Session(Protocol):
    """A loaded model that runs one step at a time."""

    @property
    def config(self) -> GemmaConfig:
        """The model."""
        ...

    @property
    def xp(self) -> Any:
        """The array library of the logits, as array-api-compat gives it."""
        ...

    def new_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """Allocate a cache.

        Raises:
            SessionError: There is not enough memory.
        """
        ...

    def step(
        self,
        input_ids: Int64Array,
        input_pos: Int64Array,
        logits_index: Int64Array,
        cache: KVCache,
    ) -> Array:
        """Run S tokens of each row and write their keys and values into the cache.

        Rows shorter than S are padded on the right with any token; what the padding wrote is
        overwritten by the row's next token and never seen before that.

        Args:
            input_ids: int64 [B, S], each below V.
            input_pos: int64 [B], tokens each row has in the cache already; input_pos + S <= T.
            logits_index: int64 [B, L], the positions among the S whose logits are wanted.
            cache: Of B rows, from this session's `new_cache`.

        Returns:
            float32 [B, L, V] in memory that the next step may write again.

        Raises:
            SessionError: The backend failed, or the cache is not one of this session's.
        """
        ...

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        ...

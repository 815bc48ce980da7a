"""Key and value caches of the eager model: `DynamicCache` grows, `StaticCache` is written in place.

`RoundedCache` holds what is left of keys and values in 8 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import PromptTooLongError, RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where the tokens of one forward pass lie in the cache.

    Attributes:
        positions: Cache slot of each token, int64 [B, S], or [1, S] when rows agree.
        start: First slot of the step.
        length: Slots in use after the step, as attention sees them (T of this step).
        is_run: Whether every row writes the slots start, start + 1, ..., length - 1.
    """

    positions: Tensor
    start: int
    length: int
    is_run: bool

    @classmethod
    def after(
        cls, num_cached: int, num_tokens: int, device: torch.device, cache_position: Tensor | None
    ) -> "Step":
        """Place `num_tokens` behind those cached, or where `cache_position` [S] or [B, S] says.

        An explicit `cache_position` costs a device synchronization: its extent sizes the step.
        """
        if cache_position is None:
            length = num_cached + num_tokens
            positions = torch.arange(num_cached, length, device=device)[None]
            return cls(positions=positions, start=num_cached, length=length, is_run=True)
        positions = cache_position[None] if cache_position.ndim == 1 else cache_position
        if positions.ndim != 2 or positions.shape[1] != num_tokens:
            raise RequestError(
                f"cache_position has shape {list(cache_position.shape)}, expected [{num_tokens}] or "
                f"[batch, {num_tokens}]: one slot for each new token"
            )
        start, last = int(positions.min()), int(positions.max())
        return cls(positions=positions, start=start, length=last + 1, is_run=False)


class KVCache(Protocol):
    """What the model asks of a cache."""

    def get_seq_length(self) -> int:
        """Return the number of slots in use: where the next token goes unless told otherwise."""
        ...

    def update(
        self, layer_idx: int, key: Tensor, value: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Store key and value [B, K, S, H] of a step; return all [B, K, step.length, H] so far."""
        ...


class DynamicCache:
    """A cache that grows by concatenation: no capacity to choose, a copy for each step.

    Attributes:
        keys: One tensor [B, K, T, H] for each layer, rotated; T is the number of cached tokens.
        values: The same for values.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return self.keys[0].shape[2] if self.keys else 0

    def update(
        self, layer_idx: int, key: Tensor, value: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Append key and value [B, K, S, H]; return all of the layer, [B, K, T, H].

        Raises:
            RequestError: If the step is to be written anywhere but behind the cached tokens.
        """
        num_cached = self.keys[layer_idx].shape[2] if layer_idx < len(self.keys) else 0
        if step.positions.shape[0] > 1 or (step.start, step.length) != (
            num_cached,
            num_cached + key.shape[2],
        ):
            raise RequestError(
                f"cache_position asks for slots {step.start} to {step.length - 1}; a DynamicCache "
                f"with {num_cached} tokens only appends. Use a StaticCache to choose slots or rows"
            )
        if layer_idx == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer_idx] = torch.cat((self.keys[layer_idx], key), dim=2)
            self.values[layer_idx] = torch.cat((self.values[layer_idx], value), dim=2)
        return self.keys[layer_idx], self.values[layer_idx]


class RoundedCache(DynamicCache):
    """A cache that grows, of keys and values as an int8 cache would hold them.

    Args:
        scales: Of each layer's keys and values: what a code of 1 stands for, [K, H] each.
    """

    def __init__(self, scales: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._scales = scales

    def update(
        self, layer_idx: int, key: Tensor, value: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Round and append key and value [B, K, S, H]; see `DynamicCache.update`."""
        key_scale, value_scale = (scale[:, None] for scale in self._scales[layer_idx])
        return super().update(
            layer_idx, _rounded(key, key_scale), _rounded(value, value_scale), step
        )


def _rounded(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale).round().clamp(-128, 127) * scale


class StaticCache:
    """A cache of fixed capacity, allocated once and written in place.

    Tensors returned by `update` are views of the cache: the next step changes them. Rows may be of
    different lengths: pass `cache_position` [B, S] to `forward`. What a padded row wrote behind its
    last token stays invisible and is overwritten by the row's next token.

    Attributes:
        keys: One tensor [B, K, T, H] for each layer, rotated; T is `max_seq_len`.
        values: The same for values.
    """

    def __init__(
        self,
        config: GemmaConfig,
        batch_size: int,
        max_seq_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, config.num_key_value_heads, max_seq_len, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.max_seq_len = max_seq_len
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self._num_slots_in_use = 0

    def get_seq_length(self) -> int:
        """Return the number of slots in use in the longest row."""
        return self._num_slots_in_use

    def reset(self) -> None:
        """Forget all tokens; memory stays allocated and its contents stay as they are."""
        self._num_slots_in_use = 0

    def update(
        self, layer_idx: int, key: Tensor, value: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Write key and value [B, K, S, H] at the step's slots; return views [B, K, length, H].

        Raises:
            PromptTooLongError: If the step does not fit the cache.
            RequestError: If the batch is not the cache's.
        """
        if step.length > self.max_seq_len or step.start < 0:
            raise PromptTooLongError(
                f"tokens for cache slots {step.start} to {step.length - 1} do not fit a cache of "
                f"{self.max_seq_len}: use a larger max_seq_len or a shorter prompt"
            )
        batch_size = self.keys[layer_idx].shape[0]
        if key.shape[0] != batch_size:
            raise RequestError(
                f"a batch of {key.shape[0]} rows does not fit a StaticCache of {batch_size}: allocate "
                "one with as many rows as the batch"
            )
        for cache, rows in ((self.keys[layer_idx], key), (self.values[layer_idx], value)):
            if step.is_run:
                cache[:, :, step.start : step.length] = rows
            else:
                batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
                cache[batch, :, step.positions] = rows.transpose(1, 2).to(cache.dtype)
        self._num_slots_in_use = step.length
        return (
            self.keys[layer_idx][:, :, : step.length],
            self.values[layer_idx][:, :, : step.length],
        )

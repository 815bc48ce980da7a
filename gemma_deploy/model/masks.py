"""Which cache slots a token of one step may attend to: `StepMasks`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma_deploy.errors import RequestError
from gemma_deploy.model.kv_cache import Step


class StepMasks:
    """Attention masks of one step, built when a layer first asks for them.

    Args:
        step: The step's slots.
        padding_mask: [B, <= step.length], nonzero where a slot holds a token; None for no padding.
            Slots it does not reach are masked.
        is_bidirectional: Whether tokens also see later ones.
        documents: Number of each token's document, int64 [B or 1, S]: tokens see those of their own
            only, and there are none but the step's. None for one document.
    """

    def __init__(
        self,
        step: Step,
        padding_mask: Tensor | None,
        *,
        is_bidirectional: bool,
        documents: Tensor | None = None,
    ) -> None:
        self._step = step
        self._is_bidirectional = is_bidirectional
        self._padding = None if padding_mask is None else _padding(padding_mask, step)
        self._documents = documents
        self._dense: dict[int | None, Tensor] = {}

    def is_token(self) -> Tensor | None:
        """Return which of the step's tokens are no padding, bool [B, S]; None for all of them."""
        if self._padding is None:
            return None
        rows = max(self._padding.shape[0], self._step.positions.shape[0])
        return self._padding.expand(rows, -1).gather(1, self._step.positions.expand(rows, -1))

    def is_all_visible(self, window: int | None) -> bool:
        """Return whether every token sees every slot, so that no mask is needed."""
        is_last = self._step.length - self._step.start == 1  # one token, nothing after it
        return (
            self._padding is None
            and self._documents is None
            and self._step.is_run
            and (self._is_bidirectional or is_last)
            and self._reaches_all(window)
        )

    def is_plain_causal(self, window: int | None) -> bool:
        """Return whether the mask is exactly a square lower triangle."""
        return (
            self._padding is None
            and self._documents is None
            and self._step.is_run
            and self._step.start == 0
            and not self._is_bidirectional
            and self._reaches_all(window)
        )

    def dense(self, window: int | None) -> Tensor:
        """Return the mask, bool [B or 1, 1, S, T], True where a token sees a slot."""
        if window not in self._dense:
            self._dense[window] = self._build(window)
        return self._dense[window]

    def _reaches_all(self, window: int | None) -> bool:
        return window is None or self._step.length <= self._reach(window)

    def _reach(self, window: int) -> int:
        """Return the distance from which on slots are out of sight.

        A bidirectional window is split between both sides, as transformers' Gemma 3 does.
        """
        return window // 2 + 1 if self._is_bidirectional else window

    def _build(self, window: int | None) -> Tensor:
        slots = torch.arange(self._step.length, device=self._step.positions.device)
        distance = self._step.positions[:, :, None] - slots  # [B or 1, S, T]
        mask = torch.ones_like(distance, dtype=torch.bool)
        if not self._is_bidirectional:
            mask &= distance >= 0
        if window is not None:
            mask &= distance.abs() < self._reach(window)
        if self._padding is not None:
            mask = mask & self._padding[:, None, :]
        if self._documents is not None:
            mask = mask & (self._documents[:, :, None] == self._documents[:, None, :])
        return mask[:, None]


def _padding(padding_mask: Tensor, step: Step) -> Tensor | None:
    """Return the padding mask as bool [B, T], or None if nothing is masked."""
    num_tokens = step.positions.shape[1]
    length = padding_mask.shape[-1]
    if (
        padding_mask.ndim != 2
        or not max(num_tokens, 1) <= length <= step.length
        or (step.is_run and length != step.length)
    ):
        raise RequestError(
            f"attention_mask has shape {list(padding_mask.shape)}, expected [batch, {step.length}]: "
            f"one column for each of {step.length} cached and new tokens"
        )
    is_token = padding_mask.bool()
    if length == step.length and bool(is_token.all()):
        return None
    return F.pad(is_token, (0, step.length - length))

"""Documents packed into one row: told apart where position ids start again."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gemma_deploy.errors import RequestError
from gemma_deploy.model.inputs import has_values
from gemma_deploy.model.kv_cache import Step
from gemma_deploy.model.masks import StepMasks


def step_masks(
    step: Step,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    has_cache: bool,
    is_bidirectional: bool,
) -> StepMasks:
    """Return the masks of a step whose position ids may pack several documents into a row.

    As in transformers, documents are kept apart where nothing else says who sees whom: without a
    cache and a mask. Elsewhere transformers lets them see each other; here they are refused.

    Args:
        step: The step's slots.
        attention_mask: [B, T], nonzero where a slot holds a token; None for no padding.
        position_ids: int64 [B or 1, S]; None for the slots.
        has_cache: Whether the step's keys go into a cache.
        is_bidirectional: Whether tokens also see later ones.

    Raises:
        RequestError: The mask does not fit the step, or packed documents would see each other.
    """
    if position_ids is None or position_ids.shape[1] == 1:
        return StepMasks(step, attention_mask, is_bidirectional=is_bidirectional)
    if attention_mask is None and not has_cache and not is_bidirectional:
        documents = document_numbers(position_ids)
        return StepMasks(step, None, is_bidirectional=False, documents=documents)
    masks = StepMasks(step, attention_mask, is_bidirectional=is_bidirectional)
    refuse_restarts(position_ids, masks.is_token())
    return masks


def document_numbers(position_ids: Tensor) -> Tensor | None:
    """Number the documents of each row, as transformers does without a cache and a mask.

    A token whose position is not the one before plus 1 begins another document.

    Args:
        position_ids: int64 [B or 1, S].

    Returns:
        int64 [B or 1, S], from 0; None where every row is one document. Costs a device
        synchronization.
    """
    is_first = position_ids.diff(dim=-1) != 1
    numbers = F.pad(is_first.cumsum(-1), (1, 0))
    if has_values(numbers) and not bool(is_first.any()):
        return None
    return numbers


def refuse_restarts(position_ids: Tensor, is_token: Tensor | None) -> None:
    """Refuse position ids that go back, where the documents they mark would see each other.

    Args:
        position_ids: int64 [B or 1, S].
        is_token: bool [B or 1, S], False for padding, whose positions mean nothing; None for none.

    Raises:
        RequestError: A token is not behind all those before it. Costs a device synchronization.
    """
    if not has_values(position_ids):
        return
    if is_token is None:
        is_token = torch.ones_like(position_ids, dtype=torch.bool)
    unseen = torch.iinfo(position_ids.dtype).min
    position_ids = torch.where(is_token, position_ids, unseen)  # [B, S]
    highest = position_ids.cummax(-1)[0]
    goes_back = is_token[:, 1:] & (position_ids[:, 1:] <= highest[:, :-1])
    if bool(goes_back.any()):
        row, column = goes_back.nonzero()[0].tolist()
        raise RequestError(
            f"position_ids go from {int(highest[row, column])} to "
            f"{int(position_ids[row, column + 1])} in row {row}: packed documents, which see each "
            "other with a KV cache, with an attention_mask, or where attention goes both ways. Leave "
            "the mask out and pass use_cache=False, and they are kept apart"
        )

"""What the models' forward methods are given, checked before torch stumbles over it.

The checks look at types, dtypes, shapes and devices. Values are looked at where that costs no device
synchronization, and not while a graph is being traced.
"""

import inspect
from typing import TypeGuard

import torch
from torch import Tensor

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.model.kv_cache import DynamicCache, KVCache, StaticCache

_INDEX_DTYPES = (torch.int64, torch.int32)


def has_values(tensor: Tensor) -> bool:
    """Tell whether a tensor's values can be looked at: not while tracing, nor on `meta`."""
    return not (tensor.is_meta or torch.compiler.is_compiling())


def check_token_ids(input_ids: object, weight: Tensor) -> Tensor:
    """Return token ids if they are int64 or int32 [B, S], of an embedding table [V, D].

    Raises:
        RequestError: They are something else.
    """
    ids = _tensor("input_ids", input_ids, "token ids [batch, tokens]", weight)
    _check_dtype("input_ids", ids, _INDEX_DTYPES, "int64")
    if ids.ndim != 2:
        raise RequestError(
            f"input_ids has shape {list(ids.shape)}, expected [batch, tokens]: a single prompt is a "
            "batch of one, input_ids[None]"
        )
    _check_range("input_ids", ids, weight.shape[0])
    return ids


def check_embeddings(inputs_embeds: object, weight: Tensor) -> Tensor:
    """Return embeddings if they are [B, S, D], of the dtype and on the device of the weights.

    Raises:
        RequestError: They are something else.
    """
    hidden_size = weight.shape[-1]
    expected = "embeddings [batch, tokens, hidden size]"
    embeds = _tensor("inputs_embeds", inputs_embeds, expected, weight)
    if embeds.ndim != 3 or embeds.shape[-1] != hidden_size:
        raise RequestError(
            f"inputs_embeds has shape {list(embeds.shape)}, expected [batch, tokens, {hidden_size}]: "
            "embeddings of this model's hidden size"
        )
    # Autocast lets products take what they are given.
    if embeds.dtype != weight.dtype and not torch.is_autocast_enabled(embeds.device.type):
        raise RequestError(
            f"inputs_embeds is {_name(embeds.dtype)}, the model {_name(weight.dtype)}: convert them "
            f"with .to({weight.dtype})"
        )
    return embeds


def check_companions(
    embeds: Tensor,
    *,
    attention_mask: object,
    position_ids: object,
    cache_position: object,
) -> None:
    """Require that what goes with embeddings [B, S, D] is of their batch, length and device.

    The length of a mask depends on the cache: `StepMasks` checks it.

    Raises:
        RequestError: Something is not.
    """
    batch, tokens, _ = embeds.shape
    if attention_mask is not None:
        mask = _tensor("attention_mask", attention_mask, "a mask [batch, tokens]", embeds)
        if mask.ndim != 2 or mask.shape[0] not in (1, batch):
            raise RequestError(
                f"attention_mask has shape {list(mask.shape)}, expected [{batch}, cached and new "
                f"tokens] for a batch of {batch}, nonzero where there is a token. Masks of four "
                "dimensions are not taken"
            )
    if position_ids is not None:
        positions = _tensor("position_ids", position_ids, "positions [batch, tokens]", embeds)
        _check_dtype("position_ids", positions, _INDEX_DTYPES, "int64")
        if positions.ndim != 2 or positions.shape not in {(batch, tokens), (1, tokens)}:
            raise RequestError(
                f"position_ids has shape {list(positions.shape)}, expected [{batch}, {tokens}] or "
                f"[1, {tokens}]: one for each new token"
            )
    if cache_position is not None:
        slots = _tensor("cache_position", cache_position, "slots [tokens]", embeds)
        _check_dtype("cache_position", slots, _INDEX_DTYPES, "int64")


def check_cache(cache: object, config: GemmaConfig, batch: int) -> KVCache:
    """Return a cache if it is one of ours, or does what they do, and of this model.

    Raises:
        RequestError: It is another library's, or another model's.
    """
    if not isinstance(cache, DynamicCache | StaticCache):
        if _follows_protocol(cache):
            return cache
        kind = type(cache)
        library = kind.__module__.partition(".")[0]
        found = kind.__name__ if library == "builtins" else f"{kind.__name__} of {library}"
        raise RequestError(
            f"past_key_values is a {found}; expected a cache of this package, since other libraries' "
            "store other things: gemma_deploy.model.DynamicCache(), which grows, or "
            "gemma_deploy.model.StaticCache(config, batch_size, max_seq_len)"
        )
    if cache.keys:
        rows, heads, _, head_dim = cache.keys[0].shape
        sizes = (len(cache.keys), heads, head_dim)
        expected = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        if sizes != expected:
            raise RequestError(
                "past_key_values is another model's: {} layers of {} KV heads of {}, expected {} of "
                "{} of {}. Start a new cache".format(*sizes, *expected)
            )
        if rows != batch:
            raise RequestError(
                f"past_key_values holds {rows} rows, the batch has {batch}: a cache goes on with the "
                "batch that it was allocated or begun for"
            )
    return cache


def check_labels(labels: object, logits: Tensor, *, ignored: int) -> Tensor:
    """Return labels if they are int64 [B, S], one for each position with logits [B, S, V].

    Args:
        labels: What was given.
        logits: Of all positions.
        ignored: The value of labels that do not count.

    Raises:
        RequestError: They are something else.
    """
    targets = _tensor("labels", labels, "labels [batch, tokens]", logits)
    _check_dtype("labels", targets, (torch.int64,), "int64")
    if targets.shape != logits.shape[:2]:
        raise RequestError(
            f"labels have shape {list(targets.shape)}, logits {list(logits.shape)}: expected one "
            "label for each position with logits. Leave logits_to_keep at 0 when training"
        )
    _check_range("labels", targets, logits.shape[-1], ignored=ignored)
    return targets


def check_kept(logits_to_keep: object, num_tokens: int) -> slice | Tensor:
    """Return which positions of S tokens `logits_to_keep` means, as an index.

    Raises:
        RequestError: It is neither a count from 0 on nor a tensor of positions.
    """
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool):
        if logits_to_keep >= 0:
            return slice(-logits_to_keep or None, None)
        raise RequestError(
            f"logits_to_keep is {logits_to_keep}; expected a number of positions from 1 on, or 0 "
            "for all"
        )
    index = _tensor("logits_to_keep", logits_to_keep, "a number, or positions int64 [n]")
    _check_dtype("logits_to_keep", index, _INDEX_DTYPES, "int64")
    if index.ndim != 1:
        raise RequestError(
            f"logits_to_keep has shape {list(index.shape)}, expected [n]: the same positions of "
            "every row"
        )
    _check_range("logits_to_keep", index, num_tokens, lowest=-num_tokens)
    return index


def _tensor(name: str, value: object, expected: str, beside: Tensor | None = None) -> Tensor:
    """Return a value that is a tensor, on the device of another."""
    if not isinstance(value, Tensor):
        raise RequestError(
            f"{name} is {type(value).__name__}, expected a torch.Tensor: {expected}. Convert it with "
            "torch.tensor"
        )
    if beside is not None and value.device != beside.device:
        raise RequestError(
            f"{name} is on {value.device}, the model's other tensors on {beside.device}: move it "
            f"with .to({str(beside.device)!r})"
        )
    return value


def _check_dtype(
    name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...], expected: str
) -> None:
    if tensor.dtype not in allowed:
        raise RequestError(
            f"{name} is {_name(tensor.dtype)}, expected {expected}: convert it with .long() if its "
            "values are whole numbers"
        )


def _check_range(
    name: str, tensor: Tensor, size: int, *, lowest: int = 0, ignored: int | None = None
) -> None:
    """Require values in [lowest, size) or `ignored`, where looking costs nothing: on a CPU."""
    if tensor.device.type != "cpu" or not has_values(tensor) or not tensor.numel():
        return
    if ignored is not None:
        tensor = tensor.masked_fill(tensor == ignored, 0)
    least, largest = (int(x) for x in torch.aminmax(tensor))
    if least < lowest or largest >= size:
        found = least if least < lowest else largest
        raise RequestError(f"{name} holds {found}; expected values from {lowest} to {size - 1}")


def _follows_protocol(cache: object) -> TypeGuard[KVCache]:
    """Tell whether something has the methods of `KVCache`; those of transformers only sound so."""
    update = getattr(cache, "update", None)
    if not callable(update) or not callable(getattr(cache, "get_seq_length", None)):
        return False
    return list(inspect.signature(update).parameters) == ["layer_idx", "key", "value", "step"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

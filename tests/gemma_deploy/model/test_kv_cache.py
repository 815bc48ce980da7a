from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import PromptTooLongError, RequestError
from gemma_deploy.model.kv_cache import DynamicCache, RoundedCache, StaticCache, Step

CONFIG = GemmaConfig(
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=4, hidden_size=8
)
CPU = torch.device("cpu")


def rows(batch: int, num_tokens: int, first: float) -> Tensor:
    """Rows [B, K, S, H] whose values name batch row and token: first + 100 * b + s."""
    tokens = first + torch.arange(num_tokens)[None] + 100 * torch.arange(batch)[:, None]
    return tokens[:, None, :, None].expand(batch, 2, num_tokens, 4).float()


@pytest.mark.parametrize("cache", [DynamicCache(), StaticCache(CONFIG, 2, 8)])
def test_steps_follow_each_other(cache: DynamicCache | StaticCache) -> None:
    for start, count in ((0, 3), (3, 1)):
        step = Step.after(cache.get_seq_length(), count, CPU, None)
        assert step.positions.tolist() == [list(range(start, start + count))]
        for layer in (0, 1):
            cache.update(layer, rows(2, count, start + layer), -rows(2, count, start), step)
    assert cache.get_seq_length() == 4
    key, value = (tensors[1][:, :, :4] for tensors in (cache.keys, cache.values))
    assert torch.equal(key, rows(2, 4, 1))
    assert torch.equal(value, -rows(2, 4, 0))


def test_rounded_cache_holds_what_codes_say() -> None:
    scales = torch.tensor([[1.0, 2.0, 0.5, 1.0], [4.0, 1.0, 1.0, 1.0]])  # [K, H]
    cache = RoundedCache([(scales, 2 * scales)])
    row = torch.tensor([[2.5, 2.9, -0.8, 300.0], [2.1, 3.5, -129.0, 0.0]])
    rows_of_a_step = row[None, :, None]
    cache.update(0, rows_of_a_step, rows_of_a_step, Step.after(0, 1, CPU, None))
    key, value = cache.update(0, rows_of_a_step, rows_of_a_step, Step.after(1, 1, CPU, None))
    assert key.shape == value.shape == (1, 2, 2, 4)
    # To the nearest code, ties to even, from -128 to 127.
    assert key[0, :, 1].tolist() == [[2.0, 2.0, -1.0, 127.0], [4.0, 4.0, -128.0, 0.0]]
    assert value[0, :, 1].tolist() == [[2.0, 4.0, -1.0, 254.0], [0.0, 4.0, -128.0, 0.0]]


def test_static_cache_writes_ragged_rows_in_place() -> None:
    cache = StaticCache(CONFIG, 2, 8)
    memory = cache.keys[0].data_ptr()
    step = Step.after(0, 2, CPU, torch.tensor([[5, 6], [0, 1]]))
    key, _ = cache.update(0, rows(2, 2, 1), rows(2, 2, 1), step)
    assert key.data_ptr() == cache.keys[0].data_ptr() == memory
    assert key.shape == (2, 2, 7, 4)
    assert key[:, 0, :, 0].tolist() == [[0, 0, 0, 0, 0, 1, 2], [101, 102, 0, 0, 0, 0, 0]]
    assert cache.get_seq_length() == 7
    cache.reset()
    assert cache.get_seq_length() == 0


def test_static_cache_casts_to_its_dtype() -> None:
    cache = StaticCache(CONFIG, 1, 4, dtype=torch.float16)
    for position in (None, torch.tensor([0, 1])):
        step = Step.after(0, 2, CPU, position)
        key, value = cache.update(1, rows(1, 2, 0), rows(1, 2, 0), step)
        assert key.dtype == value.dtype == torch.float16
        assert torch.equal(key.float(), rows(1, 2, 0))


@pytest.mark.parametrize("position", [None, torch.tensor([[7, 8]]), torch.tensor([-1, 0])])
def test_static_cache_refuses_what_does_not_fit(position: Tensor | None) -> None:
    step = Step.after(7, 2, CPU, position)
    with pytest.raises(PromptTooLongError, match=r"do not fit a cache of 8: use a larger"):
        StaticCache(CONFIG, 1, 8).update(0, rows(1, 2, 0), rows(1, 2, 0), step)


def test_static_cache_refuses_another_batch() -> None:
    """One row would otherwise be broadcast into all of them."""
    with pytest.raises(RequestError, match="a batch of 1 rows does not fit a StaticCache of 4"):
        StaticCache(CONFIG, 4, 8).update(
            0, rows(1, 2, 0), rows(1, 2, 0), Step.after(0, 2, CPU, None)
        )


@pytest.mark.parametrize(
    "position", [torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([[0, 1], [0, 1]])]
)
def test_dynamic_cache_only_appends(position: Tensor) -> None:
    step = Step.after(0, 2, CPU, position)
    with pytest.raises(RequestError, match="a DynamicCache with 0 tokens only appends"):
        DynamicCache().update(0, rows(2, 2, 0), rows(2, 2, 0), step)


def test_dynamic_cache_takes_the_position_it_would_choose() -> None:
    step = Step.after(0, 2, CPU, torch.tensor([0, 1]))
    key, _ = DynamicCache().update(0, rows(1, 2, 0), rows(1, 2, 0), step)
    assert torch.equal(key, rows(1, 2, 0))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 2)])
def test_a_slot_is_needed_for_each_token(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"cache_position has shape .*, expected \[2\]"):
        Step.after(0, 2, CPU, torch.zeros(shape, dtype=torch.int64))


def test_layers_and_heads_come_from_the_config(tiny_checkpoint: Callable[..., Path]) -> None:
    config = GemmaConfig.from_file(tiny_checkpoint("gemma2"))
    cache = StaticCache(config, 3, 10, dtype=torch.bfloat16)
    assert len(cache.keys) == len(cache.values) == 3
    assert {(t.shape, t.dtype) for t in (*cache.keys, *cache.values)} == {
        (torch.Size((3, 2, 10, 64)), torch.bfloat16)
    }

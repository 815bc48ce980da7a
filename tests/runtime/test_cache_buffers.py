import ctypes

import numpy as np
import pytest

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import SessionError
from gemma_deploy.graph_spec import CacheDType, TensorSpec, graph_spec
from gemma_deploy.runtime.cache_buffers import CacheBuffers

CONFIG = GemmaConfig(num_hidden_layers=2, num_key_value_heads=3, num_attention_heads=3, head_dim=4)


def allocate(shape: tuple[int, ...], dtype: CacheDType) -> tuple[int, object]:
    array = np.zeros(shape, dtype)
    return array.ctypes.data, array


def specs() -> tuple[TensorSpec, ...]:
    return graph_spec(CONFIG, "prefill", "float16").cache_inputs


def test_tensors_are_the_graphs_cache_inputs() -> None:
    cache = CacheBuffers.allocate(specs(), 5, 7, allocate)
    assert (cache.batch_size, cache.max_seq_len) == (5, 7)
    assert [tensor.name for tensor in cache.tensors] == [spec.name for spec in specs()]
    assert {tensor.shape for tensor in cache.tensors} == {(5, 3, 7, 4)}
    assert {tensor.dtype for tensor in cache.tensors} == {"float16"}


def test_rows_are_the_same_memory() -> None:
    cache = CacheBuffers.allocate(specs(), 5, 7, allocate)
    owner = cache.tensors[1].owner
    assert isinstance(owner, np.ndarray)
    owner[:] = np.arange(owner.size, dtype=np.float16).reshape(owner.shape)
    part = cache.rows(1, 4).rows(1, 3)
    assert (part.batch_size, part.max_seq_len) == (2, 7)
    tensor = part.tensors[1]
    assert tensor.shape == (2, 3, 7, 4)
    raw = (ctypes.c_char * owner[2:4].nbytes).from_address(tensor.address)
    np.testing.assert_array_equal(np.frombuffer(memoryview(raw), np.float16), owner[2:4].ravel())


def test_too_little_memory_says_what_to_do() -> None:
    def refuse(shape: tuple[int, ...], dtype: object) -> tuple[int, object]:
        raise MemoryError(shape, dtype)

    with pytest.raises(SessionError, match="5 rows of 7,000 tokens: use a smaller max_seq_len"):
        CacheBuffers.allocate(specs(), 5, 7000, refuse)

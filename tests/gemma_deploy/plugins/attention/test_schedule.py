import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_deploy.errors import RequestError
from gemma_deploy.plugins.attention.schedule import (
    SHARED_LIMIT_BYTES,
    CallShape,
    KernelShape,
    Launch,
    choose_tile,
    max_scratch_bytes,
    plan_launch,
)

H200_MULTIPROCESSORS = 132


def shape(*, head_dim: int = 256, group: int = 8) -> KernelShape:
    return KernelShape(head_dim=head_dim, group=group, dtype="float16", has_softcap=False)


def plan(
    group: int,
    batch: int,
    num_tokens: int,
    num_kv_heads: int,
    capacity: int,
    *,
    sliding_window: int = 0,
) -> Launch:
    call = CallShape(
        batch=batch, num_tokens=num_tokens, num_kv_heads=num_kv_heads, capacity=capacity
    )
    return plan_launch(
        shape(group=group),
        call,
        sliding_window=sliding_window,
        wide_block_m=128,
        num_multiprocessors=H200_MULTIPROCESSORS,
    )


@given(
    batch=st.integers(1, 80),
    num_tokens=st.integers(1, 4096),
    smaller=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    num_kv_heads=st.sampled_from([1, 4, 8, 16]),
    capacity=st.integers(1, 40_000),
    sliding_window=st.sampled_from([0, 1, 512]),
    group=st.sampled_from([1, 2, 8, 24]),
    wide_block_m=st.sampled_from([64, 128]),
    num_multiprocessors=st.integers(1, 300),
)
def test_no_call_needs_more_scratch_than_an_engine_sets_aside(  # noqa: PLR0917  # drawn by hypothesis
    batch: int,
    num_tokens: int,
    smaller: tuple[float, float],
    num_kv_heads: int,
    capacity: int,
    sliding_window: int,
    group: int,
    wide_block_m: int,
    num_multiprocessors: int,
) -> None:
    largest = CallShape(
        batch=batch, num_tokens=num_tokens, num_kv_heads=num_kv_heads, capacity=capacity
    )
    call = CallShape(
        batch=1 + int(smaller[0] * (batch - 1)),
        num_tokens=1 + int(smaller[1] * (num_tokens - 1)),
        num_kv_heads=num_kv_heads,
        capacity=capacity,
    )
    kernels = shape(group=group)
    launch = plan_launch(
        kernels,
        call,
        sliding_window=sliding_window,
        wide_block_m=wide_block_m,
        num_multiprocessors=num_multiprocessors,
    )
    assert launch.scratch_bytes <= max_scratch_bytes(kernels, largest)
    assert (launch.combine_grid is None) == (launch.num_parts == 1)
    # CUDA's limits on a grid.
    assert max(launch.grid[1:]) <= 65_535


@pytest.mark.parametrize(
    ("group", "batch", "num_kv_heads"), [(8, 1, 1), (8, 16, 1), (2, 1, 8), (2, 8, 8), (2, 64, 8)]
)
def test_decode_over_a_long_cache_fills_the_device(
    group: int, batch: int, num_kv_heads: int
) -> None:
    _, num_parts, heads = plan(group, batch, 1, num_kv_heads, 32_768).grid
    programs, slots = num_parts * heads, 2 * H200_MULTIPROCESSORS
    waves = -(-programs // slots)
    assert programs / (waves * slots) > 0.85


def test_prefill_that_fills_the_device_is_not_split() -> None:
    launch = plan(2, 8, 2048, 8, 4096)
    assert (launch.tile_name, launch.grid) == ("wide", (32, 1, 64))
    assert launch.scratch_bytes == 0


def test_a_short_chunk_of_one_row_is_split() -> None:
    launch = plan(8, 1, 64, 1, 8192)
    assert launch.tile_name == "wide"
    assert 8 < launch.num_parts <= 8192 // 512
    # As partial outputs and, behind them, one number per row.
    rows = launch.num_parts * 64 * 8
    assert launch.lse_offset_bytes == rows * 256 * 4
    assert launch.scratch_bytes == rows * 257 * 4


def test_a_short_cache_is_not_cut_finer_than_its_blocks() -> None:
    assert plan(8, 1, 1, 1, 128).num_parts == 2


def test_a_window_is_not_cut_finer_than_its_blocks() -> None:
    assert plan(8, 1, 1, 1, 32_768, sliding_window=511).num_parts == 8


@pytest.mark.parametrize("capability", SHARED_LIMIT_BYTES)
@pytest.mark.parametrize("group", [1, 8, 24, 64])
def test_a_narrow_tile_holds_a_token_of_any_group(group: int, capability: int) -> None:
    tile = choose_tile("narrow", shape(group=group), capability)
    assert tile.block_m >= max(group, 16)
    assert tile.block_m & (tile.block_m - 1) == 0


@pytest.mark.parametrize("head_dim", [8, 100, 264, 512])
def test_refuses_other_head_dims(head_dim: int) -> None:
    with pytest.raises(RequestError, match=rf"head_dim of 16 to 256 .* not {head_dim}.*native"):
        shape(head_dim=head_dim)


@pytest.mark.parametrize("group", [0, 65])
def test_refuses_other_groups(group: int) -> None:
    with pytest.raises(RequestError, match=rf"1 to 64 query heads per KV head, not {group}"):
        shape(group=group)

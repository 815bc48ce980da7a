"""The kernels in Triton's interpreter, on the CPU, against attention said directly in float64."""

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_deploy.ops.attention_kernels import run_kernels
from gemma_deploy.plugins.attention.schedule import COMBINE_BLOCK_PARTS, Tile

pytest.importorskip("triton")

# Weights are rounded to float16 before they meet the values, and the output is: a few of its
# roundings of numbers up to 4.
FLOAT16_ATOL = 4e-3
# float32 operands: what is left is exp2 and the order of sums.
FLOAT32_ATOL = 1e-5

SHAPES = {"mha": ((2, 2), 16), "gqa": ((6, 2), 24), "mqa": ((8, 1), 64)}
ROWS: dict[str, tuple[tuple[int, ...], int]] = {
    "first-token": ((0,), 1),
    "decode-at-block-edges": ((15, 16), 1),
    "prefill": ((0,), 11),
    "ragged-chunk": ((29, 13), 5),
}
VARIANTS = {
    "plain": (0.0, 0, 1),
    "split": (0.0, 0, 3),
    "softcap-split": (2.0, 0, 2),
    "window-1": (0.0, 1, 1),
    "window-split": (0.0, 20, 2),
    "window-softcap": (2.0, 7, 1),
}

# Every kind of rows meets every variant on one shape, and each shape meets every variant.
CASES = [("gqa", rows, variant) for rows in ROWS for variant in VARIANTS] + [
    (shape, rows, variant)
    for shape, order in (("mha", 1), ("mqa", -1))
    for variant, rows in zip(VARIANTS, itertools.cycle(list(ROWS)[::order]), strict=False)
]

Run = Callable[..., Tensor]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Return `run_kernels`, run by a process whose Triton interprets: it decides when imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(int).result()  # starts the process
    with pool:

        def run(*args: Any, **kwargs: Any) -> Tensor:
            return pool.submit(run_kernels, *args, **kwargs).result()

        yield run


def tile(*, block_m: int = 16, block_n: int = 16, skips_masks: bool = False) -> Tile:
    return Tile(
        block_m=block_m, block_n=block_n, num_warps=4, num_stages=2, skips_masks=skips_masks
    )


def run(interpreted: Run, problem: Any, **how: Any) -> Tensor:
    tensors = (problem.query, problem.key_cache, problem.value_cache, problem.input_pos)
    return interpreted(*tensors, problem.attributes, **how).double()


@pytest.mark.parametrize(("shape", "rows", "variant"), CASES)
def test_equals_the_definition(
    interpreted: Run, make_problem: Any, shape: str, rows: str, variant: str
) -> None:
    (heads, head_dim), (input_pos, num_tokens) = SHAPES[shape], ROWS[rows]
    softcap, sliding_window, num_parts = VARIANTS[variant]
    problem = make_problem(
        heads=heads,
        head_dim=head_dim,
        input_pos=input_pos,
        num_tokens=num_tokens,
        capacity=64,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    # Tokens of prefill have a loop without masks; the narrow tile has not.
    how = tile(skips_masks=num_tokens > 1)
    actual = run(interpreted, problem, tile=how, num_parts=num_parts)
    torch.testing.assert_close(actual, problem.expected, atol=FLOAT16_ATOL, rtol=0)


@pytest.mark.parametrize(
    ("head_dim", "skips_masks"), [(80, True), (96, False), (128, True), (256, False)]
)
def test_takes_gemma_head_dims_in_tiles_of_several_tokens(
    interpreted: Run, make_problem: Any, head_dim: int, *, skips_masks: bool
) -> None:
    problem = make_problem(
        heads=(4, 1),
        head_dim=head_dim,
        input_pos=(40,),
        num_tokens=10,
        capacity=64,
        sliding_window=33,
        dtype=torch.float32,
    )
    how = tile(block_m=32, skips_masks=skips_masks)
    actual = run(interpreted, problem, tile=how, num_parts=2)
    torch.testing.assert_close(actual, problem.expected, atol=FLOAT32_ATOL, rtol=0)


def test_joins_more_parts_than_fit_at_a_time_or_than_there_are_blocks(
    interpreted: Run, make_problem: Any
) -> None:
    # 95 blocks in one row, 1 in the other.
    problem = make_problem(
        heads=(8, 1),
        head_dim=16,
        input_pos=(1510, 2),
        num_tokens=1,
        capacity=1536,
        dtype=torch.float32,
    )
    assert COMBINE_BLOCK_PARTS < 95
    actual = run(interpreted, problem, tile=tile(), num_parts=96)
    torch.testing.assert_close(actual, problem.expected, atol=FLOAT32_ATOL, rtol=0)


@pytest.mark.parametrize(("input_pos", "sliding_window"), [((3,), 0), ((399_990,), 20)])
def test_work_follows_length_and_window_not_capacity(
    interpreted: Run, make_problem: Any, input_pos: tuple[int, ...], sliding_window: int
) -> None:
    problem = make_problem(
        heads=(1, 1),
        head_dim=16,
        input_pos=input_pos,
        num_tokens=1,
        capacity=400_000,
        sliding_window=sliding_window,
    )
    started_s = time.perf_counter()
    actual = run(interpreted, problem, tile=tile(), num_parts=2)
    # A block takes a few milliseconds here: all 25,000 of them would take minutes.
    assert time.perf_counter() - started_s < 10
    torch.testing.assert_close(actual, problem.expected, atol=FLOAT16_ATOL, rtol=0)


@pytest.mark.parametrize("sliding_window", [0, 20])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_never_reads_past_the_cache(
    interpreted: Run, make_problem: Any, num_parts: int, sliding_window: int
) -> None:
    problem = make_problem(
        heads=(2, 1),
        head_dim=16,
        input_pos=(30,),
        num_tokens=2,
        capacity=32,
        sliding_window=sliding_window,
    )
    # A position beyond the capacity, as only a broken caller gives, attends to what there is.
    problem.input_pos[0] = 1000
    output = run(interpreted, problem, tile=tile(), num_parts=num_parts)
    assert output.isfinite().all()
    # A window that far away holds no key.
    assert bool(output.any()) is not bool(sliding_window)


@pytest.mark.parametrize("position", [-(2**31), -1_926_892_555, -1, 2**31 - 1])
@pytest.mark.parametrize("sliding_window", [0, 4096])
@pytest.mark.parametrize("skips_masks", [False, True])
def test_no_position_leads_outside_of_the_cache(
    interpreted: Run, make_problem: Any, position: int, sliding_window: int, *, skips_masks: bool
) -> None:
    problem = make_problem(heads=(2, 1), head_dim=16, input_pos=(30,), num_tokens=2, capacity=32)
    problem = replace(
        problem,
        input_pos=torch.tensor([position], dtype=torch.int32),
        attributes=(*problem.attributes[:2], sliding_window),
        # What is there is seen, and has to be numbers.
        key_cache=problem.key_cache.nan_to_num(),
        value_cache=problem.value_cache.nan_to_num(),
    )
    how = tile(skips_masks=skips_masks)
    assert run(interpreted, problem, tile=how, num_parts=8).isfinite().all()

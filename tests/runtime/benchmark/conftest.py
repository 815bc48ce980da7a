"""Plans of one or two short cases."""

from pathlib import Path
from typing import Any, Protocol

import pytest

from gemma_deploy.runtime.benchmark.plan import BenchPlan, sweep


class Plans(Protocol):
    """Makes a plan: cases as `sweep` makes them, other fields as `BenchPlan` has them."""

    def __call__(self, model: Path, cases: Any = ..., **fields: Any) -> BenchPlan: ...


@pytest.fixture
def make_plan() -> Plans:
    """Return `make_plan(model, cases=([6, 9], [4], [1]), **fields)`."""

    def make(model: Path, cases: Any = ([6, 9], [4], [1]), **fields: Any) -> BenchPlan:
        given = {"rounds": 2, "device": "cpu", "threads": 1, **fields}
        return BenchPlan(model=model, cases=sweep(*cases), **given)

    return make

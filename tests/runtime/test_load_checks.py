import os
from typing import Any

import numpy as np
import pytest
import torch

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime import load_checks
from gemma_deploy.runtime.load_checks import check_threads, dtype_name


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (None, None),
        ("auto", None),
        ("float16", "float16"),
        ("torch.bfloat16", "bfloat16"),
        (torch.float32, "float32"),
        (torch.half, "float16"),
    ],
)
def test_names_of_dtypes(given: Any, name: Any) -> None:
    assert dtype_name(given) == name


@pytest.mark.parametrize("given", ["int8", "fp16", "", 16, True, torch.int8, np.float16, ["auto"]])
def test_other_dtypes_are_refused(given: Any) -> None:
    with pytest.raises(RequestError, match=r"dtype is .*; expected float32, float16, bfloat16, or"):
        dtype_name(given)


def test_threads_are_bounded_by_the_cores_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_checks, "available_cores", lambda: 3)
    for threads in (None, 1, 12):
        check_threads(threads)
    with pytest.raises(
        RequestError, match=r"threads is 13; this process may use 3 core\(s\), .* 12"
    ):
        check_threads(13)
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(RequestError, match="threads is "):
            check_threads(wrong)  # type: ignore[arg-type]  # on purpose


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_cores_that_the_process_may_not_use_do_not_count() -> None:
    before = os.sched_getaffinity(0)
    assert load_checks.available_cores() == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert load_checks.available_cores() == 1
    finally:
        os.sched_setaffinity(0, before)

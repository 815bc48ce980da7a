from typing import Any

import numpy as np
import pytest
import torch

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.dtypes import dtype_name


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

"""How far apart rounding alone takes numbers that were computed in another order: `assert_near`.

Every kind of processor, and every number of threads, has its own order of summing. Each rounding moves a
result by at most the unit roundoff of its dtype, as a share of the numbers that are rounded. Where large
ones cancel, a small result carries their errors: so all is measured by the largest number compared.
"""

from typing import Any, Literal

import torch

UNIT_ROUNDOFF = {"float64": 2**-53, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}

# From token to logits through three layers of the tiny models, each about 550 additions deep: sums over 64
# to 128 channels, 16 to 256 numbers of a head, up to 70 positions, up to 512 numbers of all heads.
MODEL_FLOAT32 = 1_700
# Each of 17 results of a layer is rounded to the dtype; a processor that sums in it rounds about as often
# again, since its kernels sum in blocks.
MODEL_FLOAT16 = 100


def assert_near(
    actual: Any,
    expected: Any,
    *,
    roundings: float,
    dtype: Literal["float64", "float32", "float16", "bfloat16"] = "float32",
) -> None:
    """Compare two arrays of one shape, of whatever dtypes.

    Args:
        actual: The one.
        expected: The other. Its largest number is what all differences are measured by.
        roundings: How many roundings lie between them, counted as if all went to the same side.
        dtype: What is rounded to.
    """
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    share = roundings * UNIT_ROUNDOFF[dtype]
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * float(expected.abs().max()))


def assert_logits_near(
    actual: Any, expected: Any, *, activations: Literal["float32", "float16"] = "float32"
) -> None:
    """Compare the logits of a tiny model, which computes in a dtype, with those it should give."""
    # A model whose logits hardly differ would prove nothing.
    assert float(torch.as_tensor(expected).std()) > 0.5
    roundings = MODEL_FLOAT16 if activations == "float16" else MODEL_FLOAT32
    assert_near(actual, expected, roundings=roundings, dtype=activations)

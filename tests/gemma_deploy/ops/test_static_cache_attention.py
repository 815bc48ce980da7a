from collections.abc import Sequence
from math import tanh
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.ops.static_cache_attention import (
    INPUTS,
    OP_NAME,
    StaticCacheAttentionAttributes,
    static_cache_attention,
)
from tests.rounding import assert_near

HEAD_DIM, CAPACITY = 8, 24


def make_inputs(
    *,
    input_pos: Sequence[int],
    num_tokens: int,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    batch, (num_heads, num_kv_heads) = len(input_pos), heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    angles = torch.rand(batch, num_tokens, HEAD_DIM // 2, generator=generator) * 6
    return {
        "query": draw(batch, num_tokens, num_heads, HEAD_DIM),
        "key": draw(batch, num_tokens, num_kv_heads, HEAD_DIM),
        "value": draw(batch, num_tokens, num_kv_heads, HEAD_DIM),
        "key_cache": draw(batch, num_kv_heads, CAPACITY, HEAD_DIM),
        "value_cache": draw(batch, num_kv_heads, CAPACITY, HEAD_DIM),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "input_pos": torch.tensor(input_pos),
    }


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate one vector as complex numbers: plane i is (x[i], x[i + H/2])."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[:half], x[half:]) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag))


def reference(
    inputs: dict[str, Tensor], *, scale: float, softcap: float = 0.0, sliding_window: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Say what the op means, one query at a time, in float64."""
    t = {k: v if k == "input_pos" else v.double() for k, v in inputs.items()}
    keys, values = t["key_cache"].clone(), t["value_cache"].clone()
    output = torch.zeros_like(t["query"])
    batch, num_tokens, num_heads, _ = output.shape
    group = num_heads // keys.shape[1]
    for b in range(batch):
        start = int(t["input_pos"][b])
        for i in range(num_tokens):
            for k in range(keys.shape[1]):
                keys[b, k, start + i] = rotate(t["key"][b, i, k], t["cos"][b, i], t["sin"][b, i])
                values[b, k, start + i] = t["value"][b, i, k]
        for i in range(num_tokens):
            last = start + i
            first = max(0, last - sliding_window + 1) if sliding_window else 0
            for n in range(num_heads):
                query = rotate(t["query"][b, i, n], t["cos"][b, i], t["sin"][b, i])
                scores = [
                    float(query @ keys[b, n // group, j]) * scale for j in range(first, last + 1)
                ]
                if softcap:
                    scores = [softcap * tanh(score / softcap) for score in scores]
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                output[b, i, n] = weights @ values[b, n // group, first : last + 1]
    return output, keys, values


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("sliding_window", [0, 1, 5])
@pytest.mark.parametrize(
    ("input_pos", "num_tokens"),
    [((0,), 1), ((0, 0), 7), ((3, 11, 0), 1), ((9, 2), 6), ((CAPACITY - 1,), 1)],
    ids=["first", "prefill", "ragged-decode", "ragged-chunk", "last-slot"],
)
def test_equals_the_definition(
    input_pos: Sequence[int],
    num_tokens: int,
    sliding_window: int,
    softcap: float,
    heads: tuple[int, int],
) -> None:
    inputs = make_inputs(input_pos=input_pos, num_tokens=num_tokens, heads=heads)
    attributes: dict[str, Any] = {
        "scale": 0.4,
        "softcap": softcap,
        "sliding_window": sliding_window,
    }
    actual = static_cache_attention(**inputs, **attributes)
    for got, expected in zip(actual, reference(inputs, **attributes), strict=True):
        # Sums over 8 numbers of a head and up to 24 positions, and a few factors.
        assert_near(got, expected, roundings=40)


@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16"])
def test_computes_in_every_dtype(name: Literal["float64", "float16", "bfloat16"]) -> None:
    dtype = getattr(torch, name)
    inputs = make_inputs(input_pos=(4, 0), num_tokens=3, dtype=dtype)
    actual = static_cache_attention(**inputs, scale=0.4)
    for got, expected in zip(actual, reference(inputs, scale=0.4), strict=True):
        assert got.dtype == dtype
        # As above; in 16 bits only results are rounded, not each addition, but a few more of them.
        assert_near(got, expected, roundings=40 if dtype == torch.float64 else 8, dtype=name)


def test_leaves_inputs_alone_and_other_slots_as_they_were() -> None:
    inputs = make_inputs(input_pos=(4, 9), num_tokens=2)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    _, keys, values = static_cache_attention(**inputs, scale=0.4)
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), name
    for row, start in enumerate((4, 9)):
        untouched = [slot for slot in range(CAPACITY) if slot not in (start, start + 1)]
        assert torch.equal(keys[row, :, untouched], before["key_cache"][row, :, untouched])
        assert torch.equal(values[row, :, untouched], before["value_cache"][row, :, untouched])


def test_what_lies_beyond_a_row_does_not_matter() -> None:
    inputs = make_inputs(input_pos=(4, 9), num_tokens=2)
    expected, _, _ = static_cache_attention(**inputs, scale=0.4)
    inputs["key_cache"][0, :, 6:] = 50.0
    inputs["value_cache"][0, :, 6:] = -50.0
    actual, _, _ = static_cache_attention(**inputs, scale=0.4)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("input_pos", [(23, 0), (-1, 0)])
def test_refuses_to_write_outside_the_cache(input_pos: tuple[int, int]) -> None:
    inputs = make_inputs(input_pos=input_pos, num_tokens=2)
    with pytest.raises(RequestError, match=r"cache slots -?\d+ to \d+; the cache has 24"):
        static_cache_attention(**inputs, scale=0.4)


@pytest.mark.parametrize("is_contiguous", [True, False])
def test_passes_torch_opcheck(*, is_contiguous: bool) -> None:
    inputs = make_inputs(input_pos=(4, 9), num_tokens=3)
    if not is_contiguous:
        inputs["query"] = inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)
        inputs["key_cache"] = inputs["key_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(
        static_cache_attention,
        tuple(inputs.values()),
        {"scale": 0.4, "softcap": 3.0, "sliding_window": 2},
    )


def test_schema_states_the_contract() -> None:
    namespace, name = OP_NAME.split("::")
    schema = getattr(getattr(torch.ops, namespace), name).default._schema
    tensors = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    attributes = {a.name: a.default_value for a in schema.arguments if a.kwarg_only}
    assert tuple(tensors) == INPUTS
    assert attributes == {"scale": None, "softcap": 0.0, "sliding_window": 0}
    assert len(schema.returns) == 3


def test_attributes_of_a_layer_come_from_the_config() -> None:
    config = GemmaConfig.from_dict({"model_type": "gemma2", "query_pre_attn_scalar": 144})
    sliding, full = (StaticCacheAttentionAttributes.of_layer(config, i) for i in (0, 1))
    assert sliding == StaticCacheAttentionAttributes(
        scale=1 / 12, softcap=50.0, sliding_window=4096
    )
    assert full == StaticCacheAttentionAttributes(scale=1 / 12, softcap=50.0)

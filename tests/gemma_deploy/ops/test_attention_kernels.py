"""The op on a GPU, where it runs the Triton kernels. Has not run on hardware yet."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_deploy.errors import RequestError
from gemma_deploy.ops import attention_kernels
from gemma_deploy.ops import static_cache_attention as op_module
from gemma_deploy.ops.static_cache_attention import static_cache_attention
from tests.rounding import assert_near

# A few roundings of the dtype: of the rotated vectors, the weights and the output.
ATOL = {torch.float16: 1e-2, torch.bfloat16: 6e-2}


def make_inputs(
    *,
    heads: tuple[int, int],
    head_dim: int,
    input_pos: tuple[int, ...],
    num_tokens: int,
    dtype: torch.dtype,
    capacity: int = 1024,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    batch, (num_heads, num_kv_heads) = len(input_pos), heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    angles = torch.rand(batch, num_tokens, head_dim // 2, generator=generator) * 6
    inputs = {
        "query": draw(batch, num_tokens, num_heads, head_dim),
        "key": draw(batch, num_tokens, num_kv_heads, head_dim),
        "value": draw(batch, num_tokens, num_kv_heads, head_dim),
        "key_cache": draw(batch, num_kv_heads, capacity, head_dim),
        "value_cache": draw(batch, num_kv_heads, capacity, head_dim),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "input_pos": torch.tensor(input_pos),
    }
    for row, start in enumerate(input_pos):
        for name in ("key_cache", "value_cache"):
            inputs[name][row, :, start:] = torch.nan  # what was never written does not matter
    return inputs


def on_gpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ATOL)
@pytest.mark.parametrize(("softcap", "sliding_window"), [(0.0, 0), (3.0, 0), (0.0, 100), (3.0, 1)])
@pytest.mark.parametrize(
    ("input_pos", "num_tokens"),
    [((0,), 1), ((0, 31, 32, 1023), 1), ((0,), 200), ((5, 700), 130), ((63,), 3)],
)
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((8, 1), 256), ((16, 8), 256), ((4, 4), 64), ((6, 2), 96)]
)
def test_equals_the_oracle(
    heads: tuple[int, int],
    head_dim: int,
    input_pos: tuple[int, ...],
    num_tokens: int,
    softcap: float,
    sliding_window: int,
    dtype: torch.dtype,
) -> None:
    inputs = make_inputs(
        heads=heads, head_dim=head_dim, input_pos=input_pos, num_tokens=num_tokens, dtype=dtype
    )
    attributes: dict[str, Any] = {
        "scale": head_dim**-0.5,
        "softcap": softcap,
        "sliding_window": sliding_window,
    }
    if sliding_window:
        for row, start in enumerate(input_pos):
            for name in ("key_cache", "value_cache"):
                inputs[name][row, :, : max(0, start - sliding_window + 1)] = torch.nan
    gpu = on_gpu(inputs)
    assert attention_kernels.are_supported(gpu["query"], gpu["key_cache"])
    actual = static_cache_attention(**gpu, **attributes)
    oracle = {
        name: x.nan_to_num() if x.is_floating_point() else x
        for name, x in in_float64(inputs).items()
    }
    expected = static_cache_attention(**oracle, **attributes)
    torch.testing.assert_close(actual[0].cpu().double(), expected[0], atol=ATOL[dtype], rtol=0)
    for cache, wanted in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(
            cache.cpu().double().nan_to_num(), wanted, atol=ATOL[dtype], rtol=0
        )


@pytest.mark.gpu
def test_other_dtypes_take_the_eager_path() -> None:
    inputs = make_inputs(
        heads=(2, 1), head_dim=64, input_pos=(3,), num_tokens=2, dtype=torch.float32
    )
    inputs = {n: x.nan_to_num() if x.is_floating_point() else x for n, x in inputs.items()}
    assert not attention_kernels.are_supported(inputs["query"], inputs["key_cache"])
    actual = static_cache_attention(**on_gpu(inputs), scale=0.1)
    expected = static_cache_attention(**inputs, scale=0.1)
    for got, wanted in zip(actual, expected, strict=True):
        assert_near(got.cpu(), wanted, roundings=80)  # sums over 64 numbers of a head


@pytest.mark.gpu
def test_refuses_to_write_outside_the_cache() -> None:
    inputs = make_inputs(
        heads=(2, 1), head_dim=64, input_pos=(1024,), num_tokens=1, dtype=torch.float16
    )
    with pytest.raises(RequestError, match="asks for cache slots 1024 to 1024; the cache has 1024"):
        static_cache_attention(**on_gpu(inputs), scale=0.1)


@pytest.mark.gpu
def test_passes_torch_opcheck() -> None:
    inputs = make_inputs(
        heads=(4, 2), head_dim=64, input_pos=(4, 9), num_tokens=3, dtype=torch.float16, capacity=24
    )
    inputs = {n: x.nan_to_num() if x.is_floating_point() else x for n, x in inputs.items()}
    torch.library.opcheck(
        static_cache_attention, tuple(on_gpu(inputs).values()), {"scale": 0.4, "sliding_window": 2}
    )


@pytest.mark.parametrize("input_pos", [(3, 0), (9, 14)])
def test_what_leads_up_to_the_kernels_equals_the_eager_path(
    monkeypatch: pytest.MonkeyPatch, input_pos: tuple[int, ...]
) -> None:
    """With torch in the kernels' place, on the CPU."""

    def attend(*arguments: Any) -> Tensor:
        query, keys, values, start, scale, softcap, sliding_window = arguments
        distance = (start[:, None] + torch.arange(query.shape[1]))[:, :, None] - torch.arange(16)
        is_seen = (distance >= 0) & (distance < sliding_window)
        assert softcap == 0
        return torch.nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, is_seen[:, None], scale=scale, enable_gqa=True
        ).transpose(1, 2)

    monkeypatch.setattr(op_module, "are_supported", lambda *_: True)
    monkeypatch.setattr(op_module, "attend_on_gpu", attend)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    inputs = make_inputs(
        heads=(4, 2),
        head_dim=16,
        input_pos=input_pos,
        num_tokens=2,
        dtype=torch.float32,
        capacity=16,
    )
    inputs = {n: x.nan_to_num() if x.is_floating_point() else x for n, x in inputs.items()}
    attributes: dict[str, Any] = {"scale": 0.3, "sliding_window": 5}
    on_gpu_path = op_module._static_cache_attention_on_gpu(*inputs.values(), **attributes)
    for got, wanted in zip(
        on_gpu_path, static_cache_attention(**inputs, **attributes), strict=True
    ):
        assert_near(got, wanted, roundings=40)  # sums over 16 numbers of a head and 16 positions
    inputs["input_pos"] += 13
    with pytest.raises(RequestError, match="the cache has 16"):
        op_module._static_cache_attention_on_gpu(*inputs.values(), **attributes)


def test_supports_only_what_the_kernels_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(attention_kernels, "_device_facts", lambda _device: (90, 132))

    def supported(dtype: torch.dtype, heads: int = 8, head_dim: int = 256, rows: int = 1) -> bool:
        query = torch.empty(rows, 1, heads, head_dim, dtype=dtype)
        return attention_kernels.are_supported(
            query, torch.empty(rows, 1, 8, head_dim, dtype=dtype)
        )

    assert supported(torch.float16)
    assert supported(torch.bfloat16, heads=16, head_dim=64)
    assert not supported(torch.float32)
    assert not supported(torch.float16, head_dim=512)
    assert not supported(torch.float16, heads=128)
    assert not supported(torch.float16, rows=0)
    monkeypatch.setattr(attention_kernels, "_device_facts", lambda _device: (75, 40))
    assert not supported(torch.float16)

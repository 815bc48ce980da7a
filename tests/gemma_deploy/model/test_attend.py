from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gemma_deploy.config import GemmaConfig
from gemma_deploy.model.attend import eager_attention, sdpa_attention
from gemma_deploy.model.attention import GemmaAttention
from gemma_deploy.model.kv_cache import Step
from gemma_deploy.model.masks import StepMasks
from gemma_deploy.model.transformer import GemmaModel
from tests.rounding import assert_near

CPU = torch.device("cpu")
# Of sums over 16 numbers of a head and up to 12 positions, and of a few factors.
ROUNDINGS = 32


def make_config(**values: Any) -> GemmaConfig:
    return GemmaConfig.from_dict(
        {
            "model_type": "gemma2",
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": None,
        }
        | values
    )


def float64_reference(
    layer: GemmaAttention, query: Tensor, key: Tensor, value: Tensor, masks: StepMasks
) -> tuple[Tensor, Tensor]:
    groups = layer.num_heads // layer.num_kv_heads
    key, value = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    scores = torch.einsum("bnsh,bnth->bnst", query.double(), key) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    scores = scores.where(masks.dense(layer.sliding_window), -torch.inf)
    weights = scores.softmax(-1)
    return weights @ value, weights


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["sliding", "full"])
@pytest.mark.parametrize(("num_cached", "num_tokens"), [(0, 4), (0, 12), (9, 1), (5, 3)])
def test_both_equal_a_float64_reference(
    num_cached: int, num_tokens: int, layer_idx: int, softcap: float | None
) -> None:
    layer = GemmaAttention(make_config(attn_logit_softcapping=softcap), layer_idx).eval()
    generator = torch.Generator().manual_seed(0)
    length = num_cached + num_tokens
    query = torch.randn(2, 4, num_tokens, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, length, 16, generator=generator)
    masks = StepMasks(Step.after(num_cached, num_tokens, CPU, None), None, is_bidirectional=False)
    expected, expected_weights = float64_reference(layer, query, key, value, masks)
    output, weights = eager_attention(layer, query, key, value, masks)
    assert_near(output, expected, roundings=ROUNDINGS)
    assert_near(weights, expected_weights, roundings=ROUNDINGS)
    if softcap is None:
        output = sdpa_attention(layer, query, key, value, masks)
        assert_near(output, expected, roundings=ROUNDINGS)


class Recorder:
    """Stands in for torch's function and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self._original = F.scaled_dot_product_attention

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        self.calls.append(options)
        return self._original(*args, **options)


@pytest.fixture
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    recorder = Recorder()
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorder)
    return recorder.calls


def test_sdpa_needs_no_mask_where_flash_can_run(sdpa_calls: list[dict[str, Any]]) -> None:
    model = GemmaModel(make_config()).eval()
    cache = model(torch.ones(2, 5, dtype=torch.int64)).past_key_values
    assert [(c["is_causal"], c["attn_mask"], c["enable_gqa"]) for c in sdpa_calls] == [
        (True, None, True)
    ] * 2
    sdpa_calls.clear()
    for _ in range(2):
        model(torch.ones(2, 1, dtype=torch.int64), past_key_values=cache)
    # 6 slots are within the window of 6; with 7 the sliding layer needs a mask.
    assert [c["attn_mask"] is None for c in sdpa_calls] == [True, True, False, True]
    assert not any(c["is_causal"] for c in sdpa_calls)


def test_a_capped_layer_never_runs_sdpa(sdpa_calls: list[dict[str, Any]]) -> None:
    model = GemmaModel(make_config(attn_logit_softcapping=2.0), attn_implementation="sdpa")
    model(torch.ones(2, 5, dtype=torch.int64))
    assert not sdpa_calls

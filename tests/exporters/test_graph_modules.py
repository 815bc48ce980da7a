"""The modules that are exported, run as they are: against the model's own forward."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_deploy.config import GemmaConfig
from gemma_deploy.exporters.graph_modules import DecodeModule, PrefillModule, meta_model
from gemma_deploy.graph_spec import graph_spec
from gemma_deploy.model import GemmaForCausalLM
from gemma_deploy.model.feed_forward import GemmaFeedForward
from gemma_deploy.model.norm import RMSNorm
from tests.rounding import MODEL_FLOAT32, assert_near

TinyFolders = Callable[..., Path]
NUM_TOKENS, CAPACITY = 40, 48


@pytest.fixture(params=["gemma1-mha-bias", "gemma1-untied", "gemma2", "gemma3"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: TinyFolders) -> GemmaForCausalLM:
    return GemmaForCausalLM.from_pretrained(tiny_checkpoint(request.param))


def new_cache(config: GemmaConfig, batch_size: int) -> list[Tensor]:
    """Garbage, since nothing beyond a row's length may matter."""
    shape = (batch_size, config.num_key_value_heads, CAPACITY, config.head_dim)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator) * 10 for _ in range(2 * config.num_hidden_layers)
    ]


def test_prefill_and_decode_equal_forward(
    model: GemmaForCausalLM, random_tokens: Callable[..., Tensor]
) -> None:
    """Rows of 11 and 25 tokens, padded on the right, then decoded far past the windows."""
    tokens = random_tokens(2, NUM_TOKENS)
    lengths, rows = torch.tensor([11, 25]), torch.arange(2)
    padded = tokens[:, :25].masked_fill(torch.arange(25) >= lengths[:, None], 0)
    with torch.no_grad():
        wanted = model(tokens).logits
        logits, *cache = PrefillModule(model)(
            padded,
            torch.zeros(2, dtype=torch.int64),
            lengths[:, None] - 1,
            *new_cache(model.config, 2),
        )
        assert logits.dtype == torch.float32
        assert_near(logits[:, 0], wanted[rows, lengths - 1], roundings=MODEL_FLOAT32)
        for step in range(NUM_TOKENS - 25):
            pos = lengths + step
            logits, *cache = DecodeModule(model)(tokens[rows, pos][:, None], pos, *cache)
            assert logits.shape == (2, 1, model.config.vocab_size)
            assert_near(logits[:, 0], wanted[rows, pos], roundings=MODEL_FLOAT32)


def test_the_last_feed_forward_runs_only_where_logits_are_asked_for(
    model: GemmaForCausalLM, random_tokens: Callable[..., Tensor]
) -> None:
    seen: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, GemmaFeedForward):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    start, index = torch.zeros(2, dtype=torch.int64), torch.tensor([[8, 2], [0, 0]])
    with torch.no_grad():
        PrefillModule(model)(random_tokens(2, 9), start, index, *new_cache(model.config, 2))
    size = model.config.hidden_size
    assert seen == [(2, 9, size)] * (len(model.model.layers) - 1) + [(2, 2, size)]


def test_chunks_of_ragged_rows_equal_forward(
    model: GemmaForCausalLM, random_tokens: Callable[..., Tensor]
) -> None:
    """The op itself continues several rows by several tokens, whatever a target can do."""
    tokens = random_tokens(2, 24)
    starts = torch.tensor([5, 9])
    with torch.no_grad():
        wanted = model(tokens).logits
        prefill, index = PrefillModule(model), torch.arange(9).repeat(2, 1)
        _, *cache = prefill(
            tokens[:, :9],
            torch.zeros(2, dtype=torch.int64),
            index[:, :1],
            *new_cache(model.config, 2),
        )
        positions = starts[:, None] + index
        logits, *_ = prefill(tokens.gather(1, positions), starts, index, *cache)
    rows = torch.arange(2)[:, None]
    assert_near(logits, wanted[rows, positions], roundings=MODEL_FLOAT32)


def test_logits_index_picks_and_repeats(
    model: GemmaForCausalLM, random_tokens: Callable[..., Tensor]
) -> None:
    tokens, index = random_tokens(2, 12), torch.tensor([[11, 0, 0], [3, 3, 7]])
    with torch.no_grad():
        logits, *_ = PrefillModule(model)(
            tokens, torch.zeros(2, dtype=torch.int64), index, *new_cache(model.config, 2)
        )
        wanted = model(tokens).logits[torch.arange(2)[:, None], index]
    assert_near(logits, wanted, roundings=MODEL_FLOAT32)


def test_arguments_and_results_are_those_of_the_spec(model: GemmaForCausalLM) -> None:
    config = model.config
    cache = new_cache(config, 2)
    spec = graph_spec(config, "prefill", "float32")
    assert len(cache) == len(spec.cache_inputs)
    with torch.no_grad():
        outputs = PrefillModule(model)(
            torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64),
            torch.zeros(2, 2, dtype=torch.int64), *cache,
        )  # fmt: skip
    sizes = {"B": 2, "S": 3, "L": 2, "T": CAPACITY}
    assert [(tuple(x.shape), x.dtype) for x in outputs] == [
        (tuple(sizes.get(str(d), d) for d in t.dims), getattr(torch, t.dtype)) for t in spec.outputs
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_model_to_trace_holds_no_weights(dtype: torch.dtype) -> None:
    config = GemmaConfig.from_dict({"model_type": "gemma3_text", "num_hidden_layers": 2})
    model = meta_model(config, dtype)
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert len(norms) == 2 * 6 + 1
    assert all(norm.is_folded and norm.weight.dtype == torch.float32 for norm in norms)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters() if p.ndim == 2} == {dtype}
    assert not model.training

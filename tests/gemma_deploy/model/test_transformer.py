"""What the decoder's parts contribute, its initialization, and its use by exported graphs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.model import GemmaForCausalLM, GemmaModel
from gemma_deploy.model.attention import GemmaAttention
from gemma_deploy.model.norm import RMSNorm
from gemma_deploy.model.rotary import RotaryEmbedding
from gemma_deploy.ops.static_cache_attention import (
    StaticCacheAttentionAttributes,
    static_cache_attention,
)
from tests.rounding import MODEL_FLOAT32, assert_near

Checkpoints = Callable[..., Path]
Tokens = Callable[..., Tensor]
NAMES = ["gemma1", "gemma2", "gemma3"]


def greedy(model: GemmaForCausalLM, prompts: Tensor, num_tokens: int) -> Tensor:
    ids = prompts
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = model(ids, logits_to_keep=1, use_cache=False).logits
            ids = torch.cat((ids, logits.argmax(-1)), dim=1)
    return ids[:, prompts.shape[1] :]


def without_attention(model: GemmaForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, GemmaAttention):
            module.o_proj.weight.data.zero_()


def without_rotary(model: GemmaForCausalLM) -> None:
    class Still(RotaryEmbedding):
        def forward(self, position_ids: Tensor, layer_type: Any) -> tuple[Tensor, Tensor]:
            return super().forward(torch.zeros_like(position_ids), layer_type)

    model.model.rotary_emb = Still(model.config)


def without_window(model: GemmaForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, GemmaAttention):
            module.sliding_window = None


def without_score_cap(model: GemmaForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, GemmaAttention):
            module.softcap = None


def with_one_rotary_base(model: GemmaForCausalLM) -> None:
    rope = dict(model.config.rope_parameters)
    rope["full_attention"] = rope["sliding_attention"]
    model.model.rotary_emb = RotaryEmbedding(
        dataclasses.replace(model.config, rope_parameters=rope)
    )


@pytest.mark.parametrize(
    ("name", "remove"),
    [
        *((name, without_attention) for name in NAMES),
        *((name, without_rotary) for name in NAMES),
        *((name, without_window) for name in NAMES[1:]),
        ("gemma2", without_score_cap),
        ("gemma3", with_one_rotary_base),
    ],
)
def test_every_part_changes_the_text(
    name: str,
    remove: Callable[[GemmaForCausalLM], None],
    tiny_checkpoint: Checkpoints,
    random_tokens: Tokens,
) -> None:
    model = GemmaForCausalLM.from_pretrained(tiny_checkpoint(name))
    prompts = random_tokens(4, 20)
    whole = greedy(model, prompts, 16)
    remove(model)
    changed = greedy(model, prompts, 16)
    assert (whole != changed).any(dim=1).all()


def test_window_shows_only_past_its_length(
    tiny_checkpoint: Checkpoints, random_tokens: Tokens
) -> None:
    model, ids = GemmaForCausalLM.from_pretrained(tiny_checkpoint("gemma3")), random_tokens(1, 20)
    with torch.no_grad():
        windowed = model(ids).logits
        without_window(model)
        whole = model(ids).logits
    assert_near(whole[:, :8], windowed[:, :8], roundings=MODEL_FLOAT32)
    assert ((whole - windowed)[:, 8:].abs().amax((0, 2)) > 1e-2).all()


def test_dropout_acts_in_training_only(tiny_checkpoint: Checkpoints, random_tokens: Tokens) -> None:
    ids = random_tokens(1, 20)
    for implementation in ("eager", "sdpa"):
        model = GemmaForCausalLM.from_pretrained(
            tiny_checkpoint("gemma1"),
            attn_implementation=implementation,
        )
        expected = model(ids).logits
        for module in model.modules():
            if isinstance(module, GemmaAttention):
                module.dropout = 0.5
        assert torch.equal(model(ids).logits, expected)
        model.train()
        assert not torch.allclose(model(ids).logits, expected)


def test_gradients_equal_transformers(tiny_checkpoint: Checkpoints, random_tokens: Tokens) -> None:
    folder, ids = tiny_checkpoint("gemma2"), random_tokens(2, 20)
    ours = GemmaForCausalLM.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    loss = ours(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    theirs(ids, labels=ids).loss.backward()
    for key, parameter in theirs.named_parameters():
        actual = ours.get_parameter(key).grad
        # Backwards through the layers once more.
        assert_near(actual, parameter.grad, roundings=2 * MODEL_FLOAT32)


def test_initialization_is_that_of_transformers() -> None:
    config = GemmaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        initializer_range=0.05,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = GemmaForCausalLM(config)
    for key, tensor in model.state_dict().items():
        if "norm" in key or key.endswith("bias"):
            assert not tensor.any(), key
        else:
            assert abs(float(tensor.std()) / 0.05 - 1) < 0.03, key
            assert abs(float(tensor.mean())) < 0.002, key
    assert not model.model.embed_tokens.weight[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embedding_scale_is_rounded_to_the_weights_dtype(dtype: torch.dtype) -> None:
    # sqrt(3072) = 55.4256 is 55.5 in bfloat16: the products differ.
    config = GemmaConfig(
        vocab_size=4,
        hidden_size=3072,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
    )
    model, ids = GemmaForCausalLM(config).to(dtype).model, torch.tensor([[0, 3, 1]])
    theirs = GemmaTextScaledWordEmbedding(4, 3072, 0, embed_scale=3072**0.5).to(dtype)
    theirs.load_state_dict(model.embed_tokens.state_dict())
    assert torch.equal(model.embed(ids), theirs(ids))


def test_refuses_an_unknown_attention_implementation() -> None:
    config = GemmaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1)
    with pytest.raises(RequestError, match="attn_implementation is 'flash'; expected eager, sdpa"):
        GemmaModel(config, attn_implementation="flash")  # type: ignore[arg-type]  # on purpose


class StaticCacheStep(nn.Module):
    """The model over flat caches, as an exporter writes it."""

    def __init__(self, causal_lm: GemmaForCausalLM) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(self, input_ids: Tensor, input_pos: Tensor, caches: list[Tensor]) -> list[Tensor]:
        model = self.causal_lm.model
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        updated: list[Tensor] = []

        def attend(
            layer: GemmaAttention, query: Tensor, key: Tensor, value: Tensor
        ) -> tuple[Tensor, None]:
            cos, sin = model.rotary_emb(input_pos[:, None] + steps, layer.layer_type)
            output, *new = static_cache_attention(
                query,
                key,
                value,
                *caches[2 * layer.layer_idx : 2 * layer.layer_idx + 2],
                cos.to(query),
                sin.to(query),
                input_pos,
                **dataclasses.asdict(
                    StaticCacheAttentionAttributes.of_layer(model.config, layer.layer_idx)
                ),
            )
            updated.extend(new)
            return output, None

        hidden = model.decode_layers(model.embed(input_ids), attend)
        return [self.causal_lm.logits(hidden), *updated]


def empty_caches(config: GemmaConfig, batch: int, capacity: int) -> list[Tensor]:
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    return [torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)]


@pytest.mark.parametrize("name", NAMES)
def test_static_cache_op_in_the_loop_equals_transformers(
    name: str, tiny_checkpoint: Checkpoints, oracle: Callable[..., Any], random_tokens: Tokens
) -> None:
    folder, ids = tiny_checkpoint(name), random_tokens(2, 40)
    model = GemmaForCausalLM.from_pretrained(folder)
    step = StaticCacheStep(model)
    caches, logits = empty_caches(model.config, 2, 50), []
    with torch.no_grad():
        for start, stop in ((0, 25), (25, 26), (26, 40)):
            out, *caches = step(ids[:, start:stop], torch.tensor([start, start]), caches)
            logits.append(out)
        expected = oracle(folder)(ids).logits
    assert_near(torch.cat(logits, 1), expected, roundings=MODEL_FLOAT32)


@pytest.mark.parametrize("name", NAMES)
def test_exports_on_meta_with_dynamic_batch_tokens_and_capacity(
    name: str, tiny_checkpoint: Checkpoints
) -> None:
    config = GemmaConfig.from_file(tiny_checkpoint(name))
    with torch.device("meta"):
        causal_lm = GemmaForCausalLM(config).eval()
        inputs = (
            torch.zeros(2, 3, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64),
            empty_caches(config, 2, 16),
        )
    for module in causal_lm.modules():
        if isinstance(module, RMSNorm):
            module.is_folded = True
    batch, tokens, capacity = (torch.export.Dim(d) for d in ("batch", "tokens", "capacity"))
    program = torch.export.export(
        StaticCacheStep(causal_lm),
        inputs,
        dynamic_shapes=(
            {0: batch, 1: tokens},
            {0: batch},
            [{0: batch, 2: capacity}] * len(inputs[2]),
        ),
    )
    ops = [str(node.target) for node in program.graph.nodes]
    assert ops.count("gemma_deploy.static_cache_attention.default") == config.num_hidden_layers
    logits = program.graph.output_node().args[0][0].meta["val"]
    assert logits.dtype == torch.float32
    assert not any(isinstance(size, int) for size in logits.shape[:2])
    assert {t.device.type for t in program.state_dict.values()} == {"meta"}

"""Parity with transformers' eager attention, for every generation, shape, cache and padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from gemma_deploy.errors import PromptTooLongError, RequestError
from gemma_deploy.model import DynamicCache, GemmaForCausalLM, StaticCache
from gemma_deploy.model.heads import IGNORE_INDEX, next_token_loss
from tests.rounding import MODEL_FLOAT32, assert_near

NAMES = [
    "gemma1",
    "gemma1-mha-bias",
    "gemma1-h256",
    "gemma1-untied",
    "gemma2",
    "gemma2-h256",
    "gemma3",
    "gemma3-h256",
]
ONE_OF_EACH = ["gemma1", "gemma2", "gemma3"]
IMPLEMENTATIONS: list[Literal["eager", "sdpa"]] = ["eager", "sdpa"]
LONG = 70  # tokens: far past windows of 8 and 16

Checkpoints = Callable[..., Path]
Oracle = Callable[..., Any]
Tokens = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def load(folder: Path, **options: Any) -> GemmaForCausalLM:
    return GemmaForCausalLM.from_pretrained(folder, **options)


def new_cache(model: GemmaForCausalLM, kind: str, batch: int) -> DynamicCache | StaticCache:
    return DynamicCache() if kind == "dynamic" else StaticCache(model.config, batch, LONG + 30)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(
    name: str,
    implementation: Literal["eager", "sdpa"],
    tiny_checkpoint: Checkpoints,
    oracle: Oracle,
    random_tokens: Tokens,
) -> None:
    folder, ids = tiny_checkpoint(name), random_tokens(2, LONG)
    actual = load(folder, attn_implementation=implementation)(ids).logits
    assert actual.dtype == torch.float32
    assert_near(actual, oracle(folder)(ids).logits, roundings=MODEL_FLOAT32)


@pytest.mark.parametrize("name", NAMES)
def test_parity_models_have_something_to_say(
    name: str, tiny_checkpoint: Checkpoints, oracle: Oracle, random_tokens: Tokens
) -> None:
    prompts = random_tokens(8, 6)
    texts = oracle(tiny_checkpoint(name)).generate(
        prompts, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, 6:]
    distinct = sorted(len(set(text.tolist())) for text in texts)
    assert distinct[len(distinct) // 2] >= 20, distinct


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_prefill_equals_single_steps_and_chunks(
    name: str,
    implementation: Literal["eager", "sdpa"],
    kind: str,
    tiny_checkpoint: Checkpoints,
    oracle: Oracle,
    random_tokens: Tokens,
) -> None:
    model = load(tiny_checkpoint(name), attn_implementation=implementation)
    ids = random_tokens(2, 40)
    expected = oracle(tiny_checkpoint(name))(ids).logits
    for lengths in ([40], [1] * 40, [17, 1, 9, 13]):
        cache = new_cache(model, kind, batch=2)
        logits = [
            model(chunk, past_key_values=cache).logits for chunk in torch.split(ids, lengths, dim=1)
        ]
        assert cache.get_seq_length() == 40
        assert_near(torch.cat(logits, 1), expected, roundings=MODEL_FLOAT32)


@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_padding_is_masked_as_transformers_does(
    name: str,
    implementation: Literal["eager", "sdpa"],
    side: str,
    kind: str,
    tiny_checkpoint: Checkpoints,
    oracle: Oracle,
    random_tokens: Tokens,
) -> None:
    ids, mask = random_tokens(3, 30), torch.ones(3, 30, dtype=torch.int64)
    for row, padding in ((0, 13), (2, 4)):
        mask[row, slice(padding) if side == "left" else slice(30 - padding, 30)] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    model = load(tiny_checkpoint(name), attn_implementation=implementation)
    cache = None if kind == "none" else new_cache(model, kind, batch=3)
    actual = model(
        ids,
        attention_mask=mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits
    theirs = oracle(tiny_checkpoint(name))
    expected = theirs(ids, attention_mask=mask, position_ids=position_ids).logits
    is_token = mask.bool()
    assert_near(actual[is_token], expected[is_token], roundings=MODEL_FLOAT32)
    assert actual.isfinite().all()
    for row in range(3):
        alone = model(ids[row, is_token[row]][None]).logits[0]
        assert_near(actual[row, is_token[row]], alone, roundings=MODEL_FLOAT32)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_left_padded_decode_equals_transformers(
    name: str, tiny_checkpoint: Checkpoints, oracle: Oracle, random_tokens: Tokens
) -> None:
    ids, mask = random_tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :7] = 0
    model, theirs = load(tiny_checkpoint(name)), oracle(tiny_checkpoint(name))
    expected = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    cache = StaticCache(model.config, 2, 40)
    tokens, text = ids, [ids]
    for _ in range(12):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits = model(
            tokens,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        tokens = logits.argmax(-1)
        text.append(tokens)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(torch.cat(text, 1), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_ragged_rows_of_a_static_cache_equal_single_rows(
    name: str,
    implementation: Literal["eager", "sdpa"],
    tiny_checkpoint: Checkpoints,
    random_tokens: Tokens,
) -> None:
    model = load(tiny_checkpoint(name), attn_implementation=implementation)
    ids, lengths = random_tokens(3, 40), torch.tensor([25, 9, 17])
    cache = StaticCache(model.config, 3, 48)
    start = torch.zeros(3, dtype=torch.int64)
    prompt = ids[:, : int(lengths.max())]  # what is behind a row's length is its padding
    model(prompt, past_key_values=cache, cache_position=start[:, None] + torch.arange(25))
    for step in range(12):
        position = lengths + step
        logits = model(
            ids.gather(1, position[:, None]),
            past_key_values=cache,
            cache_position=position[:, None],
        ).logits
        for row in range(3):
            alone = model(ids[row : row + 1, : int(position[row]) + 1]).logits[0, -1]
            assert_near(logits[row, 0], alone, roundings=MODEL_FLOAT32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_half_precision_equals_transformers_in_the_same_dtype(
    name: str,
    stored: str,
    dtype: Literal["float16", "bfloat16"],
    tiny_checkpoint: Checkpoints,
    oracle: Oracle,
    random_tokens: Tokens,
) -> None:
    folder, ids = tiny_checkpoint(name, stored), random_tokens(2, 24)
    model = load(folder, dtype=getattr(torch, dtype), attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    theirs = oracle(folder, dtype=dtype)
    for key, parameter in theirs.named_parameters():
        assert torch.equal(model.get_parameter(key), parameter), key
    expected = theirs(ids).logits.float()
    # The layers round in the same places: where a sum falls to the other side, once in some twenty
    # results of three layers. float32 softcapping adds the oracle's own rounding of tanh.
    assert_near(model(ids).logits, expected, roundings=20, dtype=dtype)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_loss_hidden_states_and_attentions_equal_transformers(
    name: str, tiny_checkpoint: Checkpoints, oracle: Oracle, random_tokens: Tokens
) -> None:
    ids = random_tokens(2, 30)
    labels = ids.clone()
    labels[0, :11] = IGNORE_INDEX
    options: dict[str, Any] = {
        "labels": labels,
        "output_hidden_states": True,
        "output_attentions": True,
        "use_cache": False,
    }
    # sdpa cannot return weights: asking for them must give them all the same.
    actual = load(tiny_checkpoint(name), attn_implementation="sdpa")(ids, **options)
    expected = oracle(tiny_checkpoint(name))(ids, **options)
    assert_near(actual.loss, expected.loss, roundings=MODEL_FLOAT32)
    assert actual.past_key_values is None
    for ours, theirs in (
        (actual.hidden_states, expected.hidden_states),
        (actual.attentions, expected.attentions),
    ):
        assert ours is not None
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_near(one, other, roundings=MODEL_FLOAT32)


@pytest.mark.parametrize("keep", [0, 1, 5, torch.tensor([2, 0, 7])], ids=["all", "1", "5", "index"])
def test_logits_to_keep(
    keep: int | Tensor, tiny_checkpoint: Checkpoints, oracle: Oracle, random_tokens: Tokens
) -> None:
    folder, ids = tiny_checkpoint("gemma2"), random_tokens(2, 12)
    expected = oracle(folder)(ids, logits_to_keep=keep).logits
    actual = load(folder)(ids, logits_to_keep=keep).logits
    assert_near(actual, expected, roundings=MODEL_FLOAT32)


def test_embeddings_may_be_given(tiny_checkpoint: Checkpoints, random_tokens: Tokens) -> None:
    model, ids = load(tiny_checkpoint("gemma1")), random_tokens(2, 12)
    embeds = model.model.embed(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_positions_may_be_given(
    tiny_checkpoint: Checkpoints, oracle: Oracle, random_tokens: Tokens
) -> None:
    folder, ids = tiny_checkpoint("gemma3"), random_tokens(1, 12)
    position_ids = torch.arange(0, 36, 3)[None]
    expected = oracle(folder)(ids, position_ids=position_ids).logits
    actual = load(folder)(ids, position_ids=position_ids).logits
    assert_near(actual, expected, roundings=MODEL_FLOAT32)
    assert (actual - load(folder)(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "implementation"),
    # transformers' Gemma 1 applies the flag with sdpa only; its Gemma 3 with any implementation.
    [("gemma1", "sdpa"), ("gemma3", "eager"), ("gemma3", "sdpa")],
)
def test_bidirectional_attention_equals_transformers(
    name: str,
    implementation: Literal["eager", "sdpa"],
    tiny_checkpoint: Checkpoints,
    random_tokens: Tokens,
    tmp_path: Path,
) -> None:
    import transformers

    folder = tiny_checkpoint(name)
    config = transformers.AutoConfig.from_pretrained(folder, use_bidirectional_attention=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation=implementation
    )
    theirs.save_pretrained(tmp_path)
    ids = random_tokens(2, 30)
    expected = theirs(ids, use_cache=False).logits
    model = load(tmp_path, attn_implementation=implementation)
    assert model.config.use_bidirectional_attention
    actual = model(ids, use_cache=False).logits
    assert_near(actual, expected, roundings=MODEL_FLOAT32)
    assert (actual - load(folder)(ids).logits).abs().max() > 0.1


def test_tied_head_is_the_embedding(tiny_checkpoint: Checkpoints) -> None:
    tied, untied = load(tiny_checkpoint("gemma1")), load(tiny_checkpoint("gemma1-untied"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_dtype_defaults_to_what_is_stored(tiny_checkpoint: Checkpoints) -> None:
    model = load(tiny_checkpoint("gemma1", "bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training


def test_rejects_inputs_that_contradict_each_other(
    tiny_checkpoint: Checkpoints, random_tokens: Tokens
) -> None:
    model, ids = load(tiny_checkpoint("gemma1")), random_tokens(2, 6)
    with pytest.raises(RequestError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(RequestError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=model.model.embed(ids))
    with pytest.raises(RequestError, match=r"labels have shape \[2, 6\], logits \[2, 1, 512\]"):
        model(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(PromptTooLongError, match="slots 0 to 5 do not fit a cache of 5"):
        model(ids, past_key_values=StaticCache(model.config, 2, 5))


def test_loss_of_hand_made_logits() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = torch.log(torch.tensor(3.0))  # token 2 has probability 3 / 6
    labels = torch.tensor([[1, 2, IGNORE_INDEX]])
    assert_near(next_token_loss(logits, labels), torch.tensor(2.0).log(), roundings=8)

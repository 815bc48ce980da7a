"""What forward refuses: every kind of wrong input is a RequestError that says what was found."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.model import DynamicCache, GemmaForCausalLM, GemmaModel, StaticCache
from gemma_deploy.model.kv_cache import Step

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
CONFIG = GemmaConfig(**SIZES)
IDS = torch.tensor([[2, 5, 7], [2, 6, 8]])


@pytest.fixture(scope="module")
def model() -> GemmaForCausalLM:
    return GemmaForCausalLM(CONFIG).eval()


def foreign_caches() -> list[tuple[Any, str]]:
    config = transformers.GemmaConfig(**SIZES)
    rows = torch.zeros(2, 1, 4, 16)
    return [
        (transformers.DynamicCache(), "DynamicCache of transformers"),
        (transformers.StaticCache(config, max_cache_len=8), "StaticCache of transformers"),
        (
            transformers.EncoderDecoderCache(
                transformers.DynamicCache(), transformers.DynamicCache()
            ),
            "EncoderDecoderCache of transformers",
        ),
        (((rows, rows), (rows, rows)), "tuple"),
        ([(rows, rows)], "list"),
        ({}, "dict"),
        (rows, "Tensor of torch"),
        (5, "int"),
        (False, "bool"),
        ("cache", "str"),
        (DynamicCache, "type"),
    ]


@pytest.mark.parametrize(("cache", "found"), foreign_caches(), ids=lambda x: str(x)[:20])
def test_foreign_caches(cache: Any, found: str, model: GemmaForCausalLM) -> None:
    remedy = r"gemma_deploy.model.DynamicCache\(\), .*gemma_deploy.model.StaticCache\(config"
    for part in (model, model.model):
        with pytest.raises(RequestError, match=f"past_key_values is a {found}; .*{remedy}"):
            part(IDS, past_key_values=cache)


class TestOtherModelsCaches:
    @pytest.mark.parametrize(
        "sizes", [{"num_hidden_layers": 3}, {"num_key_value_heads": 2}, {"head_dim": 8}]
    )
    def test_static(self, sizes: dict[str, int], model: GemmaForCausalLM) -> None:
        cache = StaticCache(GemmaConfig(**(SIZES | sizes)), 2, 8)

        with pytest.raises(RequestError, match=r"another model's: .* expected 2 of 1 of 16"):
            model(IDS, past_key_values=cache)

    def test_dynamic(self, model: GemmaForCausalLM) -> None:
        cache = DynamicCache()
        GemmaModel(GemmaConfig(**(SIZES | {"head_dim": 8})))(IDS, past_key_values=cache)

        with pytest.raises(RequestError, match="2 layers of 1 KV heads of 8, expected"):
            model(IDS, past_key_values=cache)

    @pytest.mark.parametrize("is_static", [False, True])
    def test_of_another_batch(self, model: GemmaForCausalLM, *, is_static: bool) -> None:
        cache = StaticCache(CONFIG, 2, 8) if is_static else DynamicCache()
        model(IDS, past_key_values=cache)

        with pytest.raises(RequestError, match="holds 2 rows, the batch has 1"):
            model(IDS[:1], past_key_values=cache)

    def test_whatever_follows_the_protocol_is_taken(self, model: GemmaForCausalLM) -> None:
        class Own:
            def __init__(self) -> None:
                self.inner = DynamicCache()

            def get_seq_length(self) -> int:
                return self.inner.get_seq_length()

            def update(
                self, layer_idx: int, key: Tensor, value: Tensor, step: Step
            ) -> tuple[Tensor, Tensor]:
                return self.inner.update(layer_idx, key, value, step)

        cache = Own()
        model(IDS[:, :2], past_key_values=cache)
        actual = model(IDS[:, 2:], past_key_values=cache).logits

        torch.testing.assert_close(actual, model(IDS).logits[:, 2:])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": [[2, 5]]}, "input_ids is list, expected a torch.Tensor: token ids"),
    ({"input_ids": "text"}, "input_ids is str, expected a torch.Tensor"),
    ({"input_ids": IDS.numpy()}, "input_ids is ndarray, expected a torch.Tensor"),
    ({"input_ids": IDS.float()}, "input_ids is float32, expected int64"),
    ({"input_ids": IDS > 5}, "input_ids is bool, expected int64"),
    ({"input_ids": IDS[0]}, r"input_ids has shape \[3\], expected .*input_ids\[None\]"),
    ({"input_ids": IDS[None]}, r"input_ids has shape \[1, 2, 3\]"),
    ({"input_ids": torch.tensor(5)}, r"input_ids has shape \[\]"),
    ({"input_ids": IDS + 50}, "input_ids holds 58; expected values from 0 to 49"),
    ({"input_ids": -IDS}, "input_ids holds -8; expected values from 0 to 49"),
    ({"input_ids": IDS.to("meta")}, "input_ids is on meta, the model's other tensors on cpu"),
    ({"inputs_embeds": [[0.5]]}, "inputs_embeds is list"),
    ({"inputs_embeds": torch.zeros(2, 3, 31)}, r"shape \[2, 3, 31\], expected .*, 32\]"),
    ({"inputs_embeds": torch.zeros(2, 32)}, r"inputs_embeds has shape \[2, 32\]"),
    (
        {"inputs_embeds": torch.zeros(2, 3, 32, dtype=torch.float64)},
        r"inputs_embeds is float64, the model float32: convert them with .to\(torch.float32\)",
    ),
    ({"attention_mask": [[1, 1, 1]] * 2}, "attention_mask is list"),
    ({"attention_mask": torch.ones(2, 2)}, r"attention_mask has shape \[2, 2\], expected"),
    ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \[2, 4\], expected"),
    ({"attention_mask": torch.ones(3, 3)}, r"attention_mask has shape \[3, 3\], expected \[2,"),
    ({"attention_mask": torch.ones(3)}, r"attention_mask has shape \[3\], expected"),
    ({"attention_mask": torch.ones(2, 1, 3, 3)}, "Masks of four dimensions are not taken"),
    ({"position_ids": [0, 1, 2]}, "position_ids is list"),
    ({"position_ids": torch.arange(3)}, r"position_ids has shape \[3\], expected \[2, 3\] or"),
    ({"position_ids": torch.arange(4)[None]}, r"position_ids has shape \[1, 4\]"),
    ({"position_ids": torch.arange(9).view(3, 3)}, r"position_ids has shape \[3, 3\]"),
    ({"position_ids": torch.arange(3.0)[None]}, "position_ids is float32, expected int64"),
    ({"cache_position": [0, 1, 2]}, "cache_position is list"),
    ({"cache_position": torch.arange(3.0)}, "cache_position is float32, expected int64"),
    (
        {"cache_position": torch.arange(3, 6), "use_cache": False},
        "cache_position asks for slots 3 to 5 and there is no cache",
    ),
    ({"labels": IDS.tolist()}, "labels is list"),
    ({"labels": IDS.int()}, "labels is int32, expected int64"),
    ({"labels": IDS.float()}, "labels is float32, expected int64"),
    ({"labels": IDS[:, :2]}, r"labels have shape \[2, 2\], logits \[2, 3, 50\]"),
    ({"labels": IDS + 50}, "labels holds 58; expected values from 0 to 49"),
    ({"labels": -IDS}, "labels holds -8; expected"),
    ({"logits_to_keep": -1}, "logits_to_keep is -1; expected a number of positions from 1 on"),
    ({"logits_to_keep": 1.0}, "logits_to_keep is float, expected"),
    ({"logits_to_keep": True}, "logits_to_keep is bool, expected"),
    ({"logits_to_keep": None}, "logits_to_keep is NoneType, expected"),
    ({"logits_to_keep": [0, 1]}, "logits_to_keep is list, expected"),
    ({"logits_to_keep": torch.tensor(1)}, r"logits_to_keep has shape \[\], expected \[n\]"),
    ({"logits_to_keep": torch.tensor([0.0])}, "logits_to_keep is float32, expected int64"),
    ({"logits_to_keep": torch.tensor([3])}, "logits_to_keep holds 3; expected values from -3 to 2"),
]


@pytest.mark.parametrize(("inputs", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_wrong_inputs(inputs: dict[str, Any], message: str, model: GemmaForCausalLM) -> None:
    given = inputs if "inputs_embeds" in inputs else {"input_ids": IDS} | inputs

    with pytest.raises(RequestError, match=message):
        model(**given)


class TestTaken:
    def test_int32_ids(self, model: GemmaForCausalLM) -> None:
        assert torch.equal(model(IDS.int()).logits, model(IDS).logits)

    def test_one_mask_for_all_rows(self, model: GemmaForCausalLM) -> None:
        mask = torch.tensor([[0, 1, 1]])

        actual = model(IDS, attention_mask=mask).logits

        assert torch.equal(actual, model(IDS, attention_mask=mask.expand(2, -1)).logits)

    def test_positions_from_the_end(self, model: GemmaForCausalLM) -> None:
        actual = model(IDS, logits_to_keep=torch.tensor([-1, 0])).logits

        torch.testing.assert_close(actual, model(IDS).logits[:, [2, 0]])

    def test_labels_that_do_not_count(self, model: GemmaForCausalLM) -> None:
        labels = torch.tensor([[2, 5, -100], [2, -100, -100]])

        logits = model(IDS).logits
        expected = -logits[0, 0].log_softmax(-1)[5]

        torch.testing.assert_close(model(IDS, labels=labels).loss, expected)

    def test_embeddings_of_another_dtype_under_autocast(self, model: GemmaForCausalLM) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.bfloat16)).logits

        assert logits.isfinite().all()

    def test_no_tokens(self, model: GemmaForCausalLM) -> None:
        assert model(IDS[:, :0]).logits.shape == (2, 0, 50)


@pytest.mark.parametrize(
    "inputs", [{}, {"position_ids": torch.tensor([[0, 1, 0]]), "use_cache": False}]
)
def test_compiled_forward(inputs: dict[str, Any], model: GemmaForCausalLM) -> None:
    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(model, backend="eager", fullgraph=True)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        actual = compiled(IDS, **inputs).logits
        expected = model(IDS, **inputs).logits

    torch.testing.assert_close(actual, expected)


def test_exported_forward(model: GemmaForCausalLM) -> None:
    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor, position_ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(ids, position_ids=position_ids, use_cache=False).logits
            return logits

    positions = torch.tensor([[0, 1, 2]])
    exported = torch.export.export(Logits(), (IDS, positions)).module()

    # Traced with one document, and right for two.
    packed = torch.tensor([[0, 1, 0]])
    expected = model(IDS, position_ids=packed, use_cache=False).logits
    torch.testing.assert_close(exported(IDS, packed), expected)

"""Packed documents against transformers, and against each document by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import RequestError
from gemma_deploy.model import DynamicCache, GemmaForCausalLM, GemmaModel, StaticCache
from gemma_deploy.model.packed_documents import document_numbers
from tests.rounding import MODEL_FLOAT32, assert_near

# Longer than the windows of 8 of the tiny models.
LENGTHS = ((13, 20, 1, 6), (11, 29))
NAMES = ["gemma1", "gemma2", "gemma3"]
IMPLEMENTATIONS: list[Literal["eager", "sdpa"]] = ["eager", "sdpa"]

Checkpoints = Callable[..., Path]
Oracle = Callable[..., Any]
Tokens = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def packed(*lengths: int, start: int = 0) -> Tensor:
    """Return position ids of documents of these lengths, [1, S]."""
    return torch.cat([torch.arange(start, start + length) for length in lengths])[None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES)
class TestKeptApart:
    @pytest.mark.parametrize(
        "position_ids",
        [
            packed(*LENGTHS[0]),
            torch.cat([packed(*lengths) for lengths in LENGTHS]),
            # One row with, one without documents.
            torch.cat([packed(40), packed(15, 25)]),
            # Whatever a document begins with, and where positions leave some out.
            packed(15, 25, start=7),
            torch.arange(0, 80, 2)[None],
            torch.zeros(1, 40, dtype=torch.int64),
        ],
        ids=["one for all rows", "rows", "one row", "not from 0", "gaps", "all 0"],
    )
    def test_as_transformers_does(
        self,
        name: str,
        implementation: Literal["eager", "sdpa"],
        position_ids: Tensor,
        tiny_checkpoint: Checkpoints,
        oracle: Oracle,
        random_tokens: Tokens,
    ) -> None:
        folder, ids = tiny_checkpoint(name), random_tokens(2, 40)
        # Their Gemma 2 has no sdpa: it cannot cap scores, and ours runs eager there.
        theirs = oracle(folder, attn_implementation="eager" if name == "gemma2" else implementation)
        ours = GemmaForCausalLM.from_pretrained(folder, attn_implementation=implementation)

        expected = theirs(ids, position_ids=position_ids, use_cache=False).logits

        actual = ours(ids, position_ids=position_ids, use_cache=False).logits
        assert_near(actual, expected, roundings=MODEL_FLOAT32)

    def test_a_document_is_read_as_by_itself(
        self,
        name: str,
        implementation: Literal["eager", "sdpa"],
        tiny_checkpoint: Checkpoints,
        random_tokens: Tokens,
    ) -> None:
        model = GemmaForCausalLM.from_pretrained(
            tiny_checkpoint(name), attn_implementation=implementation
        )
        ids = random_tokens(2, 40)
        documents = torch.split(ids, list(LENGTHS[0]), dim=1)

        together = model(ids, position_ids=packed(*LENGTHS[0]), use_cache=False).logits

        alone = torch.cat([model(x, use_cache=False).logits for x in documents], dim=1)
        assert_near(together, alone, roundings=MODEL_FLOAT32)


class TestRefused:
    """Transformers lets documents see each other in these cases, in silence."""

    @pytest.mark.parametrize(
        "inputs",
        [
            {},
            {"use_cache": True},
            {"past_key_values": DynamicCache()},
            {"attention_mask": torch.ones(2, 7), "use_cache": False},
            {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 2), "use_cache": False},
        ],
    )
    def test_with_a_cache_or_a_mask(
        self, inputs: dict[str, Any], tiny_checkpoint: Checkpoints, random_tokens: Tokens
    ) -> None:
        model = GemmaForCausalLM.from_pretrained(tiny_checkpoint("gemma2"))
        rows = torch.cat([packed(7), packed(4, 3)])

        with pytest.raises(RequestError, match=r"go from 3 to 0 in row 1: .* pass use_cache=False"):
            model(random_tokens(2, 7), position_ids=rows, **inputs)

    def test_later_in_a_cache(self, tiny_checkpoint: Checkpoints, random_tokens: Tokens) -> None:
        model = GemmaForCausalLM.from_pretrained(tiny_checkpoint("gemma1"))
        cache = StaticCache(model.config, 1, 20)
        model(random_tokens(1, 5), past_key_values=cache)

        with pytest.raises(RequestError, match="position_ids go from 6 to 0 in row 0"):
            model(
                random_tokens(1, 4),
                past_key_values=cache,
                position_ids=torch.tensor([[5, 6, 0, 1]]),
            )

    def test_where_attention_goes_both_ways(self, random_tokens: Tokens) -> None:
        config = GemmaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            use_bidirectional_attention=True,
        )

        with pytest.raises(RequestError, match="where attention goes both ways"):
            GemmaModel(config)(random_tokens(1, 7), position_ids=packed(4, 3), use_cache=False)


@pytest.mark.parametrize("pads", [0, 1])
def test_positions_of_padding_mean_nothing(
    pads: int, tiny_checkpoint: Checkpoints, oracle: Oracle, random_tokens: Tokens
) -> None:
    folder, ids = tiny_checkpoint("gemma3"), random_tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    # As transformers' generate numbers rows that are padded on the left.
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, pads)

    expected = oracle(folder)(ids, attention_mask=mask, position_ids=positions).logits

    model = GemmaForCausalLM.from_pretrained(folder)
    actual = model(ids, attention_mask=mask, position_ids=positions).logits
    seen = mask.bool()
    assert_near(actual[seen], expected[seen], roundings=MODEL_FLOAT32)


def test_gaps_in_a_cache_are_not_documents(
    tiny_checkpoint: Checkpoints, oracle: Oracle, random_tokens: Tokens
) -> None:
    folder, ids = tiny_checkpoint("gemma1"), random_tokens(2, 12)
    positions = torch.arange(0, 36, 3)[None]

    expected = oracle(folder)(ids, position_ids=positions, use_cache=True).logits

    actual = GemmaForCausalLM.from_pretrained(folder)(ids, position_ids=positions).logits
    assert_near(actual, expected, roundings=MODEL_FLOAT32)


def test_numbers() -> None:
    numbers = document_numbers(torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 5, 6, 7, 9]]))

    assert numbers is not None
    assert numbers.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 1]]
    assert document_numbers(torch.tensor([[0, 1, 2], [5, 6, 7]])) is None

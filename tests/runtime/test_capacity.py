import pytest

from gemma_deploy.errors import PromptTooLongError, RequestError
from gemma_deploy.runtime.capacity import cache_capacity, check_max_seq_len, check_token_ids
from gemma_deploy.runtime.request import GenerationOptions

NEW_TOKENS = GenerationOptions(max_new_tokens=5)


def test_capacity_is_what_is_needed_up_to_the_limit() -> None:
    few, many = GenerationOptions(max_new_tokens=20), GenerationOptions(max_new_tokens=10_000)
    assert cache_capacity([[1] * 10, [1] * 300], few, max_seq_len=None, limit=8192) == 512
    assert cache_capacity([[1] * 10], many, max_seq_len=None, limit=8192) == 8192
    assert cache_capacity([[1] * 10], few, max_seq_len=4000, limit=8192) == 4000
    whole = GenerationOptions(max_length=600)
    assert cache_capacity([[1] * 10, [1] * 500], whole, max_seq_len=None, limit=8192) == 768


def test_a_prompt_may_fill_the_cache() -> None:
    assert cache_capacity([[1] * 32], NEW_TOKENS, max_seq_len=32, limit=64) == 32


@pytest.mark.parametrize(
    ("max_seq_len", "message"),
    [
        (8, "prompt 2 has 9 tokens, the KV cache holds 8: .*larger max_seq_len \\(up to 64\\)"),
        (None, None),
    ],
)
def test_a_prompt_longer_than_the_cache_is_refused(
    max_seq_len: int | None, message: str | None
) -> None:
    prompts = [[1] * 8, [1] * (9 if max_seq_len else 65)]
    with pytest.raises(PromptTooLongError, match=message or "not made for longer sequences"):
        cache_capacity(prompts, NEW_TOKENS, max_seq_len=max_seq_len, limit=64)


def test_a_prompt_that_fills_max_length_is_refused() -> None:
    options = GenerationOptions(max_length=9)
    assert cache_capacity([[1] * 8], options, max_seq_len=None, limit=64) == 64
    with pytest.raises(PromptTooLongError, match="prompt 2 has 9 tokens, and max_length, 9 tokens"):
        cache_capacity([[1] * 8, [1] * 9], options, max_seq_len=None, limit=64)


@pytest.mark.parametrize("max_seq_len", [0, -1, 65])
def test_a_capacity_outside_the_models_range_is_refused(max_seq_len: int) -> None:
    with pytest.raises(RequestError, match=f"max_seq_len is {max_seq_len}; .* 1 to 64 tokens"):
        check_max_seq_len(max_seq_len, 64)


@pytest.mark.parametrize("token_id", [16, -1])
def test_ids_beyond_the_embedding_are_refused(token_id: int) -> None:
    check_token_ids([[0, 15]], 16)
    message = f"prompt 2 holds token id {token_id}; .* ids 0 to 15"
    with pytest.raises(RequestError, match=message):
        check_token_ids([[1], [3, token_id, 4]], 16)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt 2 is empty"):
        check_token_ids([[1], []], 16)

"""Whether prompts can be served, and how long a KV cache they need."""

from collections.abc import Sequence

from gemma_deploy.errors import PromptTooLongError, RequestError
from gemma_deploy.quoting import shortened
from gemma_deploy.runtime.request import GenerationOptions, as_int

_GRANULARITY_TOKENS = 256


def check_token_ids(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse a prompt without tokens, or with a token the embedding does not have.

    Tokenizers may know more tokens than the embedding (Gemma 3 1B's does), so the ids actually used
    are checked.

    Raises:
        RequestError: With the number of the prompt, from 1.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise RequestError(f"prompt {number} is empty: give at least one token")
        for token_id in (min(prompt), max(prompt)):
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"prompt {number} holds token id {token_id}; the model's embedding has the ids "
                    f"0 to {vocab_size - 1}: leave that token out, or use the tokenizer that "
                    "belongs to the model"
                )


def cache_capacity(
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    max_seq_len: int | None,
    limit: int,
) -> int:
    """Return how many tokens a row of the KV cache must hold.

    Args:
        prompts: Token ids.
        options: How many tokens to generate; where they do not fit, generation ends with the cache.
        max_seq_len: The capacity the user wants; None for what the prompts need.
        limit: Longest sequence the model, or the engine that runs it, is made for.

    Raises:
        PromptTooLongError: A prompt does not fit, or leaves no room in `options.max_length`.
    """
    capacity = limit if max_seq_len is None else max_seq_len
    for number, prompt in enumerate(prompts, 1):
        if options.most_new_tokens(len(prompt)) < 1:
            raise PromptTooLongError(
                f"prompt {number} has {len(prompt):,} tokens, and max_length, {options.max_length:,} "
                "tokens, counts those too: there is no room for a new one. Choose a larger "
                "max_length, or max_new_tokens instead"
            )
        if len(prompt) > capacity:
            remedy = (
                "shorten it; the model (or its engine, which a larger --max-seq-len builds) is not made "
                "for longer sequences"
                if capacity >= limit
                else f"shorten it, or choose a larger max_seq_len (up to {limit:,})"
            )
            raise PromptTooLongError(
                f"prompt {number} has {len(prompt):,} tokens, the KV cache holds {capacity:,}: {remedy}"
            )
    if max_seq_len is not None:
        return max_seq_len
    needed = max(len(prompt) + options.most_new_tokens(len(prompt)) for prompt in prompts)
    rounded = -(-needed // _GRANULARITY_TOKENS) * _GRANULARITY_TOKENS
    return min(rounded, limit)


def check_max_seq_len(max_seq_len: int | None, limit: int) -> None:
    """Refuse a capacity below one token or beyond what the model or its engine is made for.

    Raises:
        RequestError: Stating the limit.
    """
    if max_seq_len is None:
        return
    number = as_int(max_seq_len)
    if number is None or not 1 <= number <= limit:
        found = shortened(max_seq_len) if number is None else f"{number:,}"
        raise RequestError(
            f"max_seq_len is {found}; this model is made for 1 to {limit:,} tokens "
            "(max_position_embeddings in its config, or --max-seq-len of its engine's build)"
        )

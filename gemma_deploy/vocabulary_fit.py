"""Tokens that a tokenizer knows and a model does not: `tokens_without_embedding`."""

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer import GemmaTokenizer


def tokens_without_embedding(tokenizer: GemmaTokenizer, vocab_size: int) -> list[str]:
    """Return the tokens whose ids lie beyond a model's embedding, in the order of their ids.

    Gemma 3's small models have one, `<image_soft_token>`: their tokenizer is that of the models that
    see. Prompts that hold such a token cannot be run.

    Args:
        tokenizer: The model's tokenizer.
        vocab_size: Rows of the model's embedding.
    """
    found = []
    for token_id in range(vocab_size, tokenizer.vocab_size):
        try:
            found.append(tokenizer.id_to_token(token_id))
        except TokenizerError:  # ids need not follow each other without holes
            continue
    return found

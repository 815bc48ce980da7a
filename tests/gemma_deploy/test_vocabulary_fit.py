import pytest
from tokenizers import Tokenizer, models

from gemma_deploy.tokenizer import GemmaTokenizer
from gemma_deploy.vocabulary_fit import tokens_without_embedding


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(7, []), (6, ["c"]), (4, ["a", "b", "c"]), (500, [])]
)
def test_tokens_beyond_the_embedding(vocab_size: int, expected: list[str]) -> None:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "c"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = GemmaTokenizer(Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>")))

    assert tokens_without_embedding(tokenizer, vocab_size) == expected


def test_ids_with_holes() -> None:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "a": 5}
    tokenizer = GemmaTokenizer(Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>")))

    assert tokens_without_embedding(tokenizer, 4) == []

from typing import Any

import pytest
from transformers import GemmaTokenizer as TransformersGemmaTokenizer
from transformers import PreTrainedTokenizerFast

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer import GemmaTokenizer


def test_named_token_that_is_not_there(write_folder: Any) -> None:
    folder = write_folder(config={"eos_token": "</s>"})
    with pytest.raises(TokenizerError, match=r'as "eos_token".* from one checkpoint'):
        GemmaTokenizer.from_pretrained(folder)


def test_unused_roles_may_be_missing(write_folder: Any) -> None:
    folder = write_folder(config={"mask_token": "<mask>"})
    tokenizer = GemmaTokenizer.from_pretrained(folder)
    assert tokenizer.token_to_id("<mask>") is None
    assert tokenizer.vocab_size == 1200


def test_names_default_to_gemmas(write_folder: Any) -> None:
    nameless = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "-")
    tokenizer = GemmaTokenizer.from_pretrained(write_folder(config=nameless))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("oracle_class", [PreTrainedTokenizerFast, TransformersGemmaTokenizer])
def test_extra_special_tokens_are_skipped_as_in_transformers(
    write_folder: Any, oracle_class: Any
) -> None:
    folder = write_folder(config={"extra_special_tokens": ["<start_of_turn>", "def"]})
    ours = GemmaTokenizer.from_pretrained(folder)
    theirs = oracle_class.from_pretrained(folder)
    ids = ours.encode("<start_of_turn>a def<end_of_turn>")
    assert (
        ids[1:]
        == theirs("<start_of_turn>a def<end_of_turn>", add_special_tokens=False)["input_ids"]
    )
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip) == expected
        detokenizer = ours.stream(skip_special_tokens=skip)
        streamed = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
        assert streamed == expected

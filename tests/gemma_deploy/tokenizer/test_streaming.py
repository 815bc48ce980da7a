import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer import GemmaTokenizer


def streamed(tokenizer: GemmaTokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.stream(skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


def byte_ids(tokenizer: GemmaTokenizer, data: bytes) -> list[int]:
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
    return [token_id for token_id in ids if token_id is not None]


@settings(max_examples=400, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_pieces_joined_are_what_transformers_decodes(
    tokenizer: GemmaTokenizer, oracle: Any, data: st.DataObject, skip: bool
) -> None:
    # Ids below 271 are special, added and byte tokens: pathological runs are then common.
    ids = data.draw(st.lists(st.integers(0, 300) | st.integers(0, tokenizer.vocab_size - 1)))
    expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert "".join(streamed(tokenizer, ids, skip=skip)) == expected
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_text_comes_back(tokenizer: GemmaTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_bos=True, add_eos=True, allow_special=False)
    assert "".join(streamed(tokenizer, ids)) == text.replace("▁", " ")


def test_character_is_never_split(tokenizer: GemmaTokenizer) -> None:
    ids = [*byte_ids(tokenizer, "€".encode()), *tokenizer.encode("a", add_bos=False)]
    assert streamed(tokenizer, ids) == ["", "", "", "€a", ""]


def test_special_token_does_not_end_a_byte_run_it_is_skipped_in(tokenizer: GemmaTokenizer) -> None:
    first, *rest = byte_ids(tokenizer, "€".encode())
    ids = [first, tokenizer.encode("", add_bos=True)[0], *rest]
    assert streamed(tokenizer, ids)[-1] == "€"
    assert "".join(streamed(tokenizer, ids, skip=False)) == "\ufffd<bos>\ufffd\ufffd"


def test_one_invalid_byte_spoils_its_run(tokenizer: GemmaTokenizer) -> None:
    ids = byte_ids(tokenizer, "€".encode() + b"\xff")
    assert streamed(tokenizer, ids) == ["", "", "", "", "\ufffd" * 4]


def test_unfinished_bytes_come_at_the_end(tokenizer: GemmaTokenizer) -> None:
    assert streamed(tokenizer, byte_ids(tokenizer, b"\xe2\x82")) == ["", "", "\ufffd\ufffd"]


def test_leading_space_is_kept(tokenizer: GemmaTokenizer) -> None:
    assert "".join(streamed(tokenizer, tokenizer.encode(" of the"))) == " of the"


def test_finish_starts_over(tokenizer: GemmaTokenizer) -> None:
    detokenizer = tokenizer.stream()
    detokenizer.push(byte_ids(tokenizer, b"\xe2")[0])
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_bad_id_leaves_the_detokenizer_as_it_was(tokenizer: GemmaTokenizer) -> None:
    detokenizer = tokenizer.stream()
    first, *rest = byte_ids(tokenizer, "é".encode())
    detokenizer.push(first)
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        detokenizer.push(tokenizer.vocab_size)
    assert [detokenizer.push(token_id) for token_id in rest] == [""]
    assert detokenizer.finish() == "é"


def test_nothing_accumulates(tokenizer: GemmaTokenizer) -> None:
    detokenizer = tokenizer.stream()
    ids = tokenizer.encode("for line in lines: print(line)")
    tracemalloc.start()
    try:
        for _ in range(2000):
            for token_id in ids:
                detokenizer.push(token_id)
        held_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held_bytes < 20_000

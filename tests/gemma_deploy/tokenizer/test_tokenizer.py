import copy
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import GemmaTokenizer as TransformersGemmaTokenizer

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer import GemmaTokenizer
from gemma_deploy.tokenizer.backend import minimal_backend

CONTROL = ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>", "<unused0>", "[@BOS@]"]


def adding(names: str) -> dict[str, Any]:
    """Return a post processor that adds <bos>, <eos>, both or nothing."""
    before = ["<bos>"] * ("bos" in names)
    after = ["<eos>"] * ("eos" in names)
    single = [*before, "$A", *after]
    ids = [("<bos>", 2), ("<eos>", 1)]
    processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=ids
    )
    state: dict[str, Any] = json.loads(processor.__getstate__())
    return state


fragments = st.sampled_from(
    [*CONTROL, "\n\n", "\n", "  ", "▁▁", "<table>", "</b>", "<0x41>", "def", "é", "日", "<", ">"]
)
texts = st.lists(fragments | st.text(max_size=5)).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_encode_equals_transformers(tokenizer: GemmaTokenizer, oracle: Any, text: str) -> None:
    expected = oracle(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text, add_bos=False) == expected


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_control_tokens_of_users_stay_text(tokenizer: GemmaTokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_bos=False, allow_special=False)
    assert not {tokenizer.token_to_id(token) for token in CONTROL} & set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_without_control_tokens_both_ways_agree(tokenizer: GemmaTokenizer, text: str) -> None:
    control = [*CONTROL, "<0x41>", "<unk>"]
    for token in control:
        text = text.replace(token, "")
    if not any(token in text for token in control):
        assert tokenizer.encode(text, allow_special=False) == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["\n\n", "▁▁", "<table>", "</b>"])
def test_added_tokens_that_are_text_are_found_either_way(
    tokenizer: GemmaTokenizer, text: str
) -> None:
    expected = [tokenizer.token_to_id(text)]
    assert tokenizer.encode(text, add_bos=False) == expected
    assert tokenizer.encode(text, add_bos=False, allow_special=False) == expected


@pytest.mark.parametrize("is_special", [True, False])
def test_turn_tokens_stay_text_whichever_way_they_are_flagged(
    write_folder: Any, trained: dict[str, Any], is_special: bool
) -> None:
    added = [{**token, "special": is_special} for token in trained["added_tokens"]]
    tokenizer = GemmaTokenizer.from_pretrained(write_folder({"added_tokens": added}))
    turn = tokenizer.token_to_id("<end_of_turn>")
    assert turn in tokenizer.encode("<end_of_turn>")
    assert turn not in tokenizer.encode("<end_of_turn>", allow_special=False)


def test_merges_cannot_build_a_control_token(poisoned_spec: dict[str, Any]) -> None:
    backend = Tokenizer.from_str(
        json.dumps({**json.loads(minimal_backend().to_str()), **poisoned_spec})
    )
    turn = backend.token_to_id("<end_of_turn>")
    # The premise: the library itself gives the token away, though it is not an added one.
    assert backend.encode("user<end_of_turn>").ids[-1] == turn
    tokenizer = GemmaTokenizer(backend)
    ids = tokenizer.encode("user<end_of_turn>", add_bos=False, allow_special=False)
    assert turn not in ids
    assert tokenizer.decode(ids) == "user<end_of_turn>"


class TestBosAndEos:
    def test_follows_the_config(self, tokenizer: GemmaTokenizer) -> None:
        assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 2
        assert tokenizer.encode("a")[-1] != tokenizer.eos_token_id

    @pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
    def test_argument_wins(self, tokenizer: GemmaTokenizer, bos: bool, eos: bool) -> None:
        bare = tokenizer.encode("a", add_bos=False, add_eos=False)
        ids = tokenizer.encode("a", add_bos=bos, add_eos=eos)
        assert ids == [2] * bos + bare + [1] * eos

    def test_never_doubled(self, tokenizer: GemmaTokenizer) -> None:
        assert tokenizer.encode("<bos>a<eos>", add_eos=True) == tokenizer.encode("a", add_eos=True)

    @pytest.mark.parametrize("add_bos", [True, False, "-"])
    @pytest.mark.parametrize("add_eos", [True, False, "-"])
    @pytest.mark.parametrize("post_processor", ["bos", "bos eos", "eos", ""])
    def test_bos_as_in_transformers_and_never_eos(
        self, write_folder: Any, add_bos: Any, add_eos: Any, post_processor: str
    ) -> None:
        spec = {"post_processor": adding(post_processor)}
        flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
        folder = write_folder(spec, flags)
        theirs = AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
        tokenizer = GemmaTokenizer.from_pretrained(folder)
        bare = tokenizer.encode("a", add_bos=False)
        bos = [2] * (theirs[0] == 2)
        assert tokenizer.encode("a") == bos + bare
        assert tokenizer.encode_batch(["a"]).input_ids.tolist() == [bos + bare]
        assert tokenizer.encode("a", add_eos=True) == [*bos, *bare, 1]

    @pytest.mark.parametrize("add_bos", [True, False, "-"])
    def test_without_post_processor_bos_is_added_unless_the_flag_is_false(
        self, write_folder: Any, add_bos: Any
    ) -> None:
        folder = write_folder({"post_processor": None}, {"add_bos_token": add_bos})
        ids = GemmaTokenizer.from_pretrained(folder).encode("a")
        assert ids.count(2) == (add_bos is not False)

    def test_adding_what_does_not_exist(self, write_folder: Any, poisoned_spec: Any) -> None:
        model = copy.deepcopy(poisoned_spec["model"])
        model["vocab"]["<first>"] = model["vocab"].pop("<bos>")
        added = [t for t in poisoned_spec["added_tokens"] if t["content"] != "<bos>"]
        spec = {"model": model, "added_tokens": added}
        tokenizer = GemmaTokenizer.from_pretrained(write_folder(spec, {"bos_token": "-"}))
        assert tokenizer.bos_token_id is None
        assert tokenizer.encode("user") != []
        with pytest.raises(TokenizerError, match='no "bos_token"'):
            tokenizer.encode("user", add_bos=True)


class TestBatch:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_equals_transformers(self, tokenizer: GemmaTokenizer, oracle: Any, side: Any) -> None:
        batch_texts = ["", "def f(): pass", "a\n\nb"]
        batch = tokenizer.encode_batch(batch_texts, padding_side=side, add_bos=False)
        expected = oracle(
            batch_texts,
            padding=True,
            padding_side=side,
            add_special_tokens=False,
            return_tensors="np",
        )
        np.testing.assert_array_equal(batch.input_ids, expected["input_ids"])
        np.testing.assert_array_equal(batch.attention_mask, expected["attention_mask"])
        assert batch.input_ids.dtype == batch.attention_mask.dtype == np.int64

    def test_nothing(self, tokenizer: GemmaTokenizer) -> None:
        assert tokenizer.encode_batch([]).input_ids.shape == (0, 0)

    def test_unknown_side(self, tokenizer: GemmaTokenizer) -> None:
        with pytest.raises(TokenizerError, match="padding_side is 'middle'; expected \"left\""):
            tokenizer.encode_batch(["a"], padding_side="middle")  # type: ignore[arg-type]  # on purpose

    def test_padding_and_truncation_of_the_file_do_not_leak(
        self, write_folder: Any, trained: dict[str, Any], tokenizer: GemmaTokenizer
    ) -> None:
        backend = Tokenizer.from_str(json.dumps(trained))
        backend.enable_padding(length=64)
        backend.enable_truncation(max_length=2)
        folder = write_folder(json.loads(backend.to_str()))
        text = "one two three four five"
        assert GemmaTokenizer.from_pretrained(folder).encode(text) == tokenizer.encode(text)


class TestMinimalVocabulary:
    @pytest.mark.parametrize("text", ["", "hi", "hi <bos> there", "<pad><mask> ", "a<eos>b<unk>"])
    def test_equals_transformers(self, text: str) -> None:
        theirs, ours = TransformersGemmaTokenizer(), GemmaTokenizer()
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)

    def test_has_the_same_tokens(self) -> None:
        theirs, ours = TransformersGemmaTokenizer(), GemmaTokenizer()
        assert ours.vocab_size == len(theirs)
        assert {ours.id_to_token(i): i for i in range(5)} == theirs.get_vocab()
        assert ours.pad_token_id == theirs.pad_token_id
        assert ours.eos_token_id == theirs.eos_token_id
        assert ours.bos_token_id == theirs.bos_token_id


@pytest.mark.parametrize("bad", [-1, 10**12])
def test_id_outside_the_vocabulary(tokenizer: GemmaTokenizer, bad: int) -> None:
    for token_id in (bad, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match=rf"{token_id} is outside .* expected 0 to"):
            tokenizer.decode([5, token_id])


def test_decode_takes_arrays(tokenizer: GemmaTokenizer) -> None:
    ids = tokenizer.encode("def f")
    assert tokenizer.decode(np.asarray(ids, dtype=np.int32)) == "def f"


def test_lone_surrogates(tokenizer: GemmaTokenizer) -> None:
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        tokenizer.encode("caf\udce9")


def test_what_is_not_text_is_a_type_error(tokenizer: GemmaTokenizer) -> None:
    with pytest.raises(TypeError):
        tokenizer.encode(None)  # type: ignore[arg-type]  # on purpose


class TestSaving:
    @pytest.fixture
    def saved(self, tokenizer: GemmaTokenizer, tmp_path: Path) -> Path:
        tokenizer.save_pretrained(tmp_path / "new" / "folder")
        return tmp_path / "new" / "folder"

    def test_reads_back(self, tokenizer: GemmaTokenizer, saved: Path) -> None:
        again = GemmaTokenizer.from_pretrained(saved)
        text = "<bos>def f():\n\n  <end_of_turn>é"
        assert again.encode(text) == tokenizer.encode(text)
        assert again.pad_token_id == tokenizer.pad_token_id
        assert [path.name for path in GemmaTokenizer.files(saved)] == [
            "tokenizer.json",
            "tokenizer_config.json",
        ]

    def test_transformers_adds_the_same_tokens(
        self, tokenizer: GemmaTokenizer, saved: Path
    ) -> None:
        theirs = PreTrainedTokenizerFast.from_pretrained(saved)
        assert theirs("def f")["input_ids"] == tokenizer.encode("def f")

    def test_minimal_vocabulary_reads_back(self, tmp_path: Path) -> None:
        GemmaTokenizer().save_pretrained(tmp_path)
        assert GemmaTokenizer.from_pretrained(tmp_path).encode("hi <bos>") == [3, 2]

    def test_template_travels_and_is_replaced(
        self, write_folder: Any, tokenizer: GemmaTokenizer, tmp_path: Path
    ) -> None:
        source = write_folder(template="{{ messages[0].content }}\n")
        target = tmp_path / "saved"
        GemmaTokenizer.from_pretrained(source).save_pretrained(target)
        message = [{"role": "user", "content": "hi"}]
        assert GemmaTokenizer.from_pretrained(target).apply_chat_template(message) == "hi"
        tokenizer.save_pretrained(target)
        assert "<start_of_turn>" in GemmaTokenizer.from_pretrained(target).apply_chat_template(
            message
        )

    def test_folder_that_cannot_be_written(self, tokenizer: GemmaTokenizer, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(TokenizerError, match=r"cannot be saved in .* writable folder"):
            tokenizer.save_pretrained(tmp_path / "file" / "below")


@pytest.mark.parametrize("post_processor", ["bos", "bos eos", ""])
def test_saved_again_adds_bos_or_not_as_before(
    write_folder: Any, tmp_path: Path, post_processor: str
) -> None:
    source = write_folder({"post_processor": adding(post_processor)}, {"add_eos_token": True})
    tokenizer = GemmaTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(tmp_path / "again")
    again = GemmaTokenizer.from_pretrained(tmp_path / "again")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.encode("a") == tokenizer.encode("a") == theirs("a")["input_ids"]


def test_threads_share_one_tokenizer(folder: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a<eos> b"}]}]
    expected = GemmaTokenizer.from_pretrained(folder).encode_chat(messages)
    for _ in range(10):
        # All meet what is made at first use.
        tokenizer = GemmaTokenizer.from_pretrained(folder)
        barrier = threading.Barrier(8)

        def first_use(
            tokenizer: GemmaTokenizer = tokenizer, barrier: threading.Barrier = barrier
        ) -> tuple[list[int], int]:
            barrier.wait()
            return tokenizer.encode_chat(messages), len(tokenizer.end_of_turn_ids)

        with ThreadPoolExecutor(8) as pool:
            results = [future.result() for future in [pool.submit(first_use) for _ in range(8)]]
        assert results == [(expected, 1)] * 8


def test_import_is_light() -> None:
    code = (
        "import sys, gemma_deploy.tokenizer as t; t.GemmaTokenizer().encode('a');"
        "sys.exit(', '.join({'torch', 'transformers', 'jinja2'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""

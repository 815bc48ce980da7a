from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer.backend import read_backend

# With such a one, the library panics for a text of 30 letters.
REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
NESTED = {"type": "Sequence", "pretokenizers": [REGEX]}


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="is not a folder"):
        read_backend(tmp_path / "none")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json\. Download it"):
        read_backend(tmp_path)


def test_sentencepiece_only(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.model .* Convert it once, .*save_pretrai"
    ):
        read_backend(tmp_path)


@pytest.mark.parametrize("text", ["", '{"model": ', "{}", '{"model": {"type": "BPE"}}', "[]"])
def test_broken_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        read_backend(tmp_path)


def test_post_processor_without_its_token(write_folder: Any, capfd: Any) -> None:
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [bos], "pair": [bos], "special_tokens": {}}
    with pytest.raises(TokenizerError, match=r"cannot be read as a tokenizer: .*Download"):
        read_backend(write_folder({"post_processor": processor}))
    assert "panicked" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "model is WordL"),
        ({"normalizer": {"type": "NFKC"}}, "its normalizer is .*NFKC"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}, "xxx… .1,000,0.. characters"),
        ({"normalizer": {"type": "Prepend", "prepend": "▁"}}, "its normalizer is .*Prepend"),
        ({"decoder": None}, r"its decoder is \[\]"),
        (
            {"decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0}},
            "its decoder is .*Strip",
        ),
        ({"pre_tokenizer": REGEX}, "its pre-tokenizer is .*Regex"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [NESTED]}},
            "its pre-tokenizer is .*Regex",
        ),
    ],
)
def test_other_families(write_folder: Any, spec: dict[str, Any], problem: str) -> None:
    folder = write_folder({"added_tokens": [], **spec} if "model" in spec else spec)
    with pytest.raises(TokenizerError, match=f"is not a Gemma tokenizer: .*{problem}"):
        read_backend(folder)


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
    ],
)
def test_variants_of_the_layout(write_folder: Any, normalizer: Any) -> None:
    assert read_backend(write_folder({"normalizer": normalizer})).get_vocab_size() == 1200


def test_padding_that_the_file_states_is_not_made(write_folder: Any) -> None:
    padding = {
        "strategy": {"Fixed": 10**10},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    assert read_backend(write_folder({"padding": padding})).encode("a").ids

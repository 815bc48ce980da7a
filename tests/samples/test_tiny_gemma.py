"""The small model in the repository, judged by transformers, and the script that made it."""

import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

ROOT = Path(__file__).parents[2]
TINY_GEMMA = ROOT / "samples" / "tiny-gemma"
CONTEXT_TOKENS = 512
MAX_LOSS = 3.4
# transformers' annotations leave out half of what these classes do.
AUTO_MODEL: Any = AutoModelForCausalLM


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY_GEMMA)


@pytest.fixture(scope="module")
def model() -> Any:
    return AUTO_MODEL.from_pretrained(TINY_GEMMA, dtype=torch.float32)


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    return (TINY_GEMMA / "held_out.txt").read_text(encoding="utf-8").split("\n\n\n")


def test_folder_holds_at_most_8_mb() -> None:
    assert sum(path.stat().st_size for path in TINY_GEMMA.rglob("*")) <= 8_000_000


def test_transformers_finds_every_weight(tokenizer: PreTrainedTokenizerBase) -> None:
    loaded, report = AUTO_MODEL.from_pretrained(TINY_GEMMA, output_loading_info=True)

    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.vocab_size == len(tokenizer)
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert ids == (0, 1, 2)
    assert (loaded.config.pad_token_id, loaded.config.bos_token_id) == (0, 2)
    assert loaded.generation_config.eos_token_id == 1


def test_every_matrix_splits_into_blocks_of_128(model: Any) -> None:
    matrices = [p for p in model.parameters() if p.dim() == 2]

    assert len(matrices) == 1 + 7 * model.config.num_hidden_layers
    assert all(matrix.shape[1] % 128 == 0 for matrix in matrices)


@torch.inference_mode()
def test_held_out_loss(model: Any, tokenizer: PreTrainedTokenizerBase, held_out: list[str]) -> None:
    # The script's own measure, on the first quarter of the text: documents end to end, cut in rows.
    ids = [i for text in held_out for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // CONTEXT_TOKENS * CONTEXT_TOKENS]).view(-1, CONTEXT_TOKENS)
    rows = rows[: len(rows) // 4]

    loss = model(rows, labels=rows).loss.item()

    # An untrained model of this vocabulary is at ln 2048 = 7.6.
    assert loss < MAX_LOSS, f"perplexity {math.exp(loss):.1f}"


@pytest.mark.parametrize(
    "prompt", ["The for statement is used to", "Return the", "A function definition"]
)
def test_greedy_text_is_made_of_documentation_words(
    prompt: str, model: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    known = set(re.findall(r"[a-z]+", " ".join(topics.topics.values()).lower()))
    inputs = tokenizer(prompt, return_tensors="pt")

    output = model.generate(**inputs, max_new_tokens=48, do_sample=False, min_new_tokens=24)

    text = str(tokenizer.decode(output[0], skip_special_tokens=True))
    words = re.findall(r"[a-z]+", text.removeprefix(prompt).lower())
    assert len(words) >= 20, text
    assert sum(word in known for word in words) >= 0.9 * len(words), text


def test_tokenizer_restores_every_text(
    tokenizer: PreTrainedTokenizerBase, held_out: list[str]
) -> None:
    for text in [*held_out, "two  spaces, a\ttab, \u00e9\u4e2d\U0001f600 by bytes\n\n\n"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("width", range(2, 17))
def test_indentation_is_one_token(width: int, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("\n" + " " * width + "for") == ["\n", "▁" * width, "for"]


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("in 2024") == ["in", "▁", "2", "0", "2", "4"]


def test_wrapped_prose_is_joined_and_code_is_not() -> None:
    normalize = runpy.run_path(str(ROOT / "samples" / "tiny_gemma_documents.py"))["normalize"]
    prose = "A sentence long enough that its author had to wrap it somewhere,\nhere.  The \u2018end\u2019."
    code = "for name in names:\n    print(name)\n\n\n>>> 1\n1"

    assert normalize(f"Title\n=====\n\n{prose}\n\n{code}\n") == (
        "Title\n\nA sentence long enough that its author had to wrap it somewhere, here. The 'end'."
        "\n\nfor name in names:\n    print(name)\n\n>>> 1\n1"
    )


def test_held_out_documents_are_normalized(held_out: list[str]) -> None:
    normalize = runpy.run_path(str(ROOT / "samples" / "tiny_gemma_documents.py"))["normalize"]

    assert len(held_out) > 20
    paragraphs = [p for text in held_out for p in text.split("\n\n") if len(p) > 60]
    assert len({" ".join(p.lower().split()) for p in paragraphs}) == len(paragraphs)
    assert all(p == p.rstrip() and "\t" not in p for p in paragraphs)
    assert all(normalize(p) for p in paragraphs)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "samples.train_tiny_gemma", "--threads", "1", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_script_writes_a_folder_transformers_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"

    done = run_script(
        "--output", str(folder), "--steps", "2", "--max-documents", "8", "--vocab-size", "600"
    )

    assert done.returncode == 0, done.stderr
    assert re.search(r"held-out loss \d+\.\d+ nats/token \(\d+\.\d+ bits/byte\)", done.stdout)
    written = AUTO_MODEL.from_pretrained(folder)
    assert not caplog.records  # transformers logs what it does not understand in config.json
    ids = AutoTokenizer.from_pretrained(folder)("import x", return_tensors="pt")["input_ids"]
    assert written(ids).logits.shape == (1, ids.shape[1], 600)
    assert {path.name for path in folder.iterdir()} <= {path.name for path in TINY_GEMMA.iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-documents", "1"], "1 documents are too few"),
        (["--max-documents", "8", "--vocab-size", "50000"], "tokens worth learning"),
    ],
)
def test_script_refuses_too_little_text(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run_script("--output", str(tmp_path / "model"), *arguments)

    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "model").exists()

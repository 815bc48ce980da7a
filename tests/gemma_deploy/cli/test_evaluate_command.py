import csv
import json
import math
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from gemma_deploy import api
from gemma_deploy.tokenizer import GemmaTokenizer
from tests.rounding import MODEL_FLOAT32, UNIT_ROUNDOFF

TEXT = "You may reproduce and distribute copies of the Work in any medium, with a number: 42. " * 4
# Nats of a text are logits and differences of them: as far off as these are.
REL = MODEL_FLOAT32 * UNIT_ROUNDOFF["float32"]
# A token that the model has no embedding of, by whether it is a control token.
BEYOND = {True: "<beyond>", False: "qqbeyondqq"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def narrow(bundle_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's bundle in bfloat16: near it, not equal to it."""
    folder = tmp_path_factory.mktemp("narrow") / "bundle"
    return api.export(bundle_checkpoint, folder, dtype="bfloat16", graphs=["onnxruntime"]).folder


@pytest.fixture(scope="module")
def token_ids(bundle: Path) -> list[int]:
    """<bos> and the text."""
    return GemmaTokenizer.from_pretrained(bundle).encode(TEXT, add_bos=True)


@pytest.fixture(scope="module")
def log_p(bundle_checkpoint: Path, token_ids: list[int], oracle: Any) -> torch.Tensor:
    """What transformers says of the text read at once, [S, V]."""
    return log_probabilities(oracle(bundle_checkpoint), token_ids)


def log_probabilities(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([token_ids[:-1]])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


class TestFigures:
    def test_perplexity_is_exp_of_transformers_loss(
        self,
        invoke: Callable[..., Result],
        bundle: Path,
        bundle_checkpoint: Path,
        token_ids: list[int],
        text: Path,
        oracle: Any,
    ) -> None:
        result = invoke("evaluate", bundle, "--text", text, "--json")

        ids = torch.tensor([token_ids])
        with torch.inference_mode():
            loss = oracle(bundle_checkpoint)(ids, labels=ids).loss.item()
        found = json.loads(result.stdout)
        assert found["perplexity"] == pytest.approx(math.exp(loss), rel=REL)
        assert found["tokens"] == len(token_ids) - 1
        assert (found["context_tokens"], found["stride"]) == (512, 256)
        for name in ("reference_perplexity", "kl_mean_nats", "kl_p99_nats", "top1_agreement"):
            assert found[name] is None

    def test_distances_are_those_of_both_models_by_transformers(
        self,
        invoke: Callable[..., Result],
        narrow: Path,
        bundle_checkpoint: Path,
        token_ids: list[int],
        log_p: torch.Tensor,
        text: Path,
        tmp_path: Path,
    ) -> None:
        from transformers import AutoModelForCausalLM

        result = invoke(
            "evaluate", narrow, "--text", text, "--reference", bundle_checkpoint, "--json"
        )

        # The bundle rounds weights to bfloat16 and computes in float32.
        folder = shutil.copytree(bundle_checkpoint, tmp_path / "rounded")
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {
                name: tensor if "norm" in name else tensor.bfloat16().float()
                for name, tensor in tensors.items()
            },
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        rounded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        log_q = log_probabilities(rounded, token_ids)
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        found = json.loads(result.stdout)
        assert found["kl_mean_nats"] == pytest.approx(kl.mean().item(), rel=1e-2)
        assert found["kl_p99_nats"] == pytest.approx(np.percentile(kl.numpy(), 99), rel=1e-2)
        same = (log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item()
        assert found["top1_agreement"] == pytest.approx(same)
        loss = -log_p[torch.arange(len(log_p)), torch.tensor(token_ids[1:])].mean().item()
        assert found["reference_perplexity"] == pytest.approx(math.exp(loss), rel=REL)

    def test_windows_follow_the_stated_rule(
        self,
        invoke: Callable[..., Result],
        bundle: Path,
        bundle_checkpoint: Path,
        token_ids: list[int],
        text: Path,
        oracle: Any,
    ) -> None:
        options = ("--context-tokens", 20, "--stride", 7, "--max-tokens", 45)
        result = invoke("evaluate", bundle, "--text", text, *options, "--json")

        bos, *ids = token_ids[:46]
        total = 0.0
        for index in range(45):
            # The earliest window that holds the token.
            start = 7 * max(0, -(-(index - 19) // 7))
            read = [bos, *ids[start : index + 1]]
            total -= log_probabilities(oracle(bundle_checkpoint), read)[-1, ids[index]].item()
        found = json.loads(result.stdout)
        assert found["tokens"] == 45
        assert found["perplexity"] == pytest.approx(math.exp(total / 45), rel=REL)

    def test_people_get_a_table(
        self, invoke: Callable[..., Result], bundle: Path, bundle_checkpoint: Path, text: Path
    ) -> None:
        result = invoke("evaluate", bundle, "--text", text, "--reference", bundle_checkpoint)

        assert result.exit_code == 0, result.output
        assert "in windows of 512, by 256" in result.stdout
        assert "same likeliest token  100.00%" in result.stdout

    def test_a_checkpoint_is_its_own_equal(
        self, invoke: Callable[..., Result], bundle_checkpoint: Path, text: Path
    ) -> None:
        result = invoke(
            "evaluate",
            bundle_checkpoint,
            "--text",
            text,
            "--reference",
            bundle_checkpoint,
            "--json",
        )

        found = json.loads(result.stdout)
        assert found["kl_max_nats"] == 0
        assert found["perplexity"] == found["reference_perplexity"]


class TestPlot:
    def test_csv_has_a_line_for_each_token(
        self,
        invoke: Callable[..., Result],
        narrow: Path,
        bundle_checkpoint: Path,
        token_ids: list[int],
        text: Path,
        tmp_path: Path,
    ) -> None:
        path = tmp_path / "plot.csv"
        result = invoke(
            "evaluate",
            narrow,
            "--text",
            text,
            "--reference",
            bundle_checkpoint,
            "--plot",
            path,
            "--json",
        )

        found = json.loads(result.stdout)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["token_id"]) for row in rows] == token_ids[1:]
        assert [int(row["position"]) for row in rows] == list(range(len(rows)))
        kl = [float(row["kl_nats"]) for row in rows]
        assert np.mean(kl) == pytest.approx(found["kl_mean_nats"], rel=1e-4)
        nll = [float(row["nll_nats"]) for row in rows]
        assert math.exp(np.mean(nll)) == pytest.approx(found["perplexity"], rel=1e-3)

    def test_svg_is_a_drawing(
        self, invoke: Callable[..., Result], bundle: Path, token_ids: list[int], text: Path
    ) -> None:
        path = text.with_name("plot.svg")

        result = invoke("evaluate", bundle, "--text", text, "--plot", path)

        assert result.exit_code == 0, result.output
        assert f"wrote {path}" in result.stderr
        drawing = ET.parse(path).getroot()
        columns = drawing.findall("{http://www.w3.org/2000/svg}rect")
        assert len(columns) == 1 + min(200, len(token_ids) - 1)
        texts = ["".join(x.itertext()) for x in drawing.iter("{http://www.w3.org/2000/svg}text")]
        assert texts[0].endswith(bundle.name)
        assert f"{text.name}, in windows of 512, by 256: perplexity " in texts[1]
        assert "UTC" in texts[2]

    @pytest.mark.parametrize("name", ["plot.png", "missing/plot.svg"])
    def test_other_files_are_refused_before_anything_runs(
        self, name: str, invoke: Callable[..., Result], bundle: Path, text: Path
    ) -> None:
        result = invoke("evaluate", bundle, "--text", text, "--plot", text.parent / name)

        assert result.exit_code == 2
        assert "expected a file that ends in .svg or .csv" in result.stderr or (
            "does not exist" in result.stderr
        )


class TestTokensWithoutEmbedding:
    @pytest.fixture
    def wider(self, bundle_checkpoint: Path, tmp_path: Path) -> Callable[[bool], Path]:
        """Return `wider(special)`: the checkpoint, its tokenizer with one token more than the model."""

        def write(special: bool) -> Path:
            folder = shutil.copytree(bundle_checkpoint, tmp_path / f"wider-{special}")
            vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
            raw = json.loads((folder / "tokenizer.json").read_text())
            known = len(raw["model"]["vocab"])
            assert known <= vocab_size
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            filling = [f"<filling{number}>" for number in range(known, vocab_size)]
            for number, content in enumerate([*filling, BEYOND[special]], known):
                added = {"id": number, "content": content, **flags, "special": special}
                raw["added_tokens"].append(added)
            (folder / "tokenizer.json").write_text(json.dumps(raw))
            return folder

        return write

    def test_a_control_token_is_text(
        self, wider: Callable[[bool], Path], invoke: Callable[..., Result], text: Path
    ) -> None:
        text.write_text(TEXT + BEYOND[True])

        result = invoke("evaluate", wider(True), "--text", text, "--json")

        assert result.exit_code == 0, result.stderr

    def test_another_is_named(
        self, wider: Callable[[bool], Path], invoke: Callable[..., Result], text: Path
    ) -> None:
        text.write_text(TEXT + BEYOND[False])

        result = invoke("evaluate", wider(False), "--text", text)

        assert result.exit_code == 2
        assert "the text holds 'qqbeyondqq', which the tokenizer knows" in result.stderr


class TestErrors:
    def test_a_text_that_is_too_short(
        self, invoke: Callable[..., Result], bundle: Path, text: Path
    ) -> None:
        result = invoke("evaluate", bundle, "--text", text, "--max-tokens", 15)

        assert result.exit_code == 2
        assert "the text has 15 tokens; at least 16 are needed" in result.stderr

    def test_a_text_that_is_not_utf_8(
        self, invoke: Callable[..., Result], bundle: Path, text: Path
    ) -> None:
        text.write_bytes(b"\xff\xfe")

        result = invoke("evaluate", bundle, "--text", text)

        assert result.exit_code == 2
        assert "is not UTF-8 text" in result.stderr

    def test_a_context_beyond_the_models(
        self, invoke: Callable[..., Result], bundle: Path, text: Path
    ) -> None:
        result = invoke("evaluate", bundle, "--text", text, "--context-tokens", 8193)

        assert result.exit_code == 2
        assert "--context-tokens is 8,193; this model is made for up to 8,192" in result.stderr

    def test_a_stride_beyond_the_context(
        self, invoke: Callable[..., Result], bundle: Path, text: Path
    ) -> None:
        result = invoke("evaluate", bundle, "--text", text, "--context-tokens", 64, "--stride", 65)

        assert result.exit_code == 2
        assert "stride is 65; expected 1 to the context's 64 tokens" in result.stderr

    def test_the_checkpoint_of_another_model(
        self, invoke: Callable[..., Result], bundle: Path, text: Path, tiny_checkpoint: Any
    ) -> None:
        result = invoke(
            "evaluate", bundle, "--text", text, "--reference", tiny_checkpoint("gemma3")
        )

        assert result.exit_code == 1
        assert "is not what" in result.stderr
        assert "was made of: its" in result.stderr

    def test_logits_that_are_no_numbers(
        self, invoke: Callable[..., Result], bundle_checkpoint: Path, text: Path, tmp_path: Path
    ) -> None:
        folder = shutil.copytree(bundle_checkpoint, tmp_path / "damaged")
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] = math.nan
        save_file(tensors, folder / "model.safetensors")

        alone = invoke("evaluate", folder, "--text", text)
        reference = invoke("evaluate", bundle_checkpoint, "--text", text, "--reference", folder)

        assert "the model put out NaN or infinity within 16 tokens of token 0" in alone.stderr
        assert "the reference itself gives logits that are NaN" in reference.stderr
        assert (alone.exit_code, reference.exit_code) == (1, 1)

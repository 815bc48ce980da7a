import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from gemma_deploy.inspection import inspect_folder


class TestBundle:
    def test_shows_model_weights_files_and_memory(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        result = invoke("inspect", bundle)

        assert result.exit_code == 0
        for text in (
            f"Bundle {bundle}",
            "Gemma 1, ",
            "4 query and 1 key-value heads of 64",
            "computes in   float32, KV cache float32",
            "prefill.onnx",
            "LICENSE",
            "feed-forward",
            "1024 tokens",
            "8192 tokens",
        ):
            assert text in result.stdout

    def test_shows_the_manifest(self, invoke: Callable[..., Result], bundle: Path) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text())

        result = invoke("inspect", bundle)

        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        made_by = next(line for line in lines if line.startswith("made by "))
        for name, version in manifest["versions"].items():
            assert f"{name} {version}" in made_by
        start = lines.index("Graphs") + 1
        assert lines[start : start + 12] == [
            "prefill.onnx takes input_ids int64 [B, S]",
            "input_pos int64 [B]",
            "logits_index int64 [B, L]",
            "past_key_values.{layer}.key|value float32 [B, 1, T, 64]",
            "gives logits float32 [B, L, 512]",
            "present.{layer}.key|value float32 [B, 1, T, 64]",
            "decode.onnx takes input_ids int64 [B, 1]",
            "input_pos int64 [B]",
            "past_key_values.{layer}.key|value float32 [B, 1, T, 64]",
            "gives logits float32 [B, 1, 512]",
            "present.{layer}.key|value float32 [B, 1, T, 64]",
            "Memory for 1 prompt at a time of",
        ]
        assert "format bundle format 1" in lines
        assert "limits 8192 tokens of prompt and answer together" in lines
        assert "tokenizer " + ", ".join(manifest["tokenizer"]) in lines
        assert "generation generation_config.json" in lines
        source = manifest["source"]["config_sha256"]
        assert any(x.startswith(f"made of a folder, config.json {source[:12]}") for x in lines)

    def test_json_holds_the_manifest(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke("inspect", bundle, "--json")

        manifest = json.loads((bundle / "manifest.json").read_text())
        assert json.loads(result.stdout)["manifest"] == manifest

    def test_json_adds_up(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke(
            "inspect",
            bundle,
            "--json",
            "--max-seq-len",
            100,
            "--max-seq-len",
            200,
            "--batch-size",
            3,
        )

        report = json.loads(result.stdout)
        weights, (short, long) = report["weights"], report["memory"]
        assert sum(weights["by_group"].values()) == weights["size_bytes"]
        assert report["files"]["weights.safetensors"] > weights["size_bytes"]
        assert (short["max_seq_len"], long["max_seq_len"]) == (100, 200)
        # 2 (key, value) * 3 layers * 1 head * 64 * 4 bytes * 3 rows * 100 tokens.
        assert short["kv_cache_bytes"] == 2 * 3 * 64 * 4 * 3 * 100
        assert long["kv_cache_bytes"] == 2 * short["kv_cache_bytes"]
        activations_and_cache = short["kv_cache_bytes"] + short["activation_bytes"]
        assert short["gpu_total_bytes"] == short["weights_bytes"] + activations_and_cache
        process = short["runtime_bytes"] + short["tokenizer_bytes"] + activations_and_cache
        assert short["cpu_total_bytes"] == process + short["cpu_weights_bytes"]
        assert short["prepacked_total_bytes"] == process + short["prepacked_weights_bytes"]

    def test_longer_than_the_model(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke("inspect", bundle, "--max-seq-len", 9000)

        assert result.exit_code == 2
        assert "max_seq_len is 9000" in result.stderr


class TestQuantizedBundle:
    @pytest.fixture(autouse=True)
    def _quantized(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the bundle be inspected as a quantized one."""
        quantized = dataclasses.replace(
            inspect_folder(bundle),
            parameters=2_000_000,
            weights_bytes=1 << 20,
            bytes_by_group={"embedding": 1 << 19, "attention": 1 << 19},
            bits_by_group={"embedding": 8.5, "attention": 4.25},
            matrices_by_format={"int4/64": 35, "int8/32": 1},
        )
        monkeypatch.setattr("gemma_deploy.inspection.inspect_folder", lambda _: quantized)

    def test_shows_formats_and_what_a_weight_takes(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        lines = [" ".join(line.split()) for line in invoke("inspect", bundle).stdout.splitlines()]

        assert "quantized int4/64: 35 matrices, int8/32: 1 matrix" in lines
        start = lines.index("Weights") + 1
        assert lines[start : start + 3] == [
            "embedding 512.00 KiB, 8.50 bits per weight",
            "attention 512.00 KiB, 4.25 bits per weight",
            "total 1.00 MiB, 4.19 bits per weight",
        ]

    def test_json(self, invoke: Callable[..., Result], bundle: Path) -> None:
        weights = json.loads(invoke("inspect", bundle, "--json").stdout)["weights"]

        assert weights["bits_per_weight"] == pytest.approx(8 * (1 << 20) / 2_000_000)
        assert weights["bits_by_group"] == {"embedding": 8.5, "attention": 4.25}
        assert weights["matrices_by_format"] == {"int4/64": 35, "int8/32": 1}


class TestBundleWithEngines:
    @pytest.fixture
    def folder(self, bundle: Path, tmp_path: Path, write_engine: Callable[[Path], Path]) -> Path:
        """Return a bundle with an engine, and with another whose plan was cut short."""
        folder = tmp_path / "bundle"
        shutil.copytree(bundle, folder)
        write_engine(folder / "engines" / "sound")
        (write_engine(folder / "engines" / "broken") / "engine.plan").write_bytes(b"pl")
        return folder

    def test_a_line_for_each(self, invoke: Callable[..., Result], folder: Path) -> None:
        lines = [" ".join(line.split()) for line in invoke("inspect", folder).stdout.splitlines()]

        start = lines.index("Engines") + 1
        assert lines[start] == (
            "sound batches of 2, 100 tokens, one-engine, attention auto, 2.00 KiB"
        )
        assert lines[start + 1].startswith("broken cannot be opened: ")
        assert "engine.plan has 2 bytes" in lines[start + 1]

    def test_json(self, invoke: Callable[..., Result], folder: Path) -> None:
        report = json.loads(invoke("inspect", folder, "--json").stdout)

        (engine,) = report["engines"]
        assert (engine["name"], engine["size_bytes"]) == ("sound", 2048)
        assert engine["build"]["limits"]["max_batch_size"] == 2
        assert list(report["damaged_engines"]) == ["broken"]

    def test_without_engines_there_is_no_such_table(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        assert "Engines" not in invoke("inspect", bundle).stdout
        assert json.loads(invoke("inspect", bundle, "--json").stdout)["engines"] == []


class TestEngine:
    @pytest.fixture
    def folder(self, tmp_path: Path, write_engine: Callable[[Path], Path]) -> Path:
        return write_engine(tmp_path / "packed")

    def test_shows_what_it_is(self, invoke: Callable[..., Result], folder: Path) -> None:
        result = invoke("inspect", folder)

        assert result.exit_code == 0
        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        assert lines[0] == f"Engine {folder}"
        for line in (
            "library tensorrt-rtx 1.7.1; no other version loads it",
            "built for compute capability 8.0, 8.9",
            "layout one-engine",
            "attention auto, plugin version 1",
            "limits batches of 2",
            "100 tokens of prompt and answer together",
            "30 tokens of a prompt in a step",
            "positions of a row with logits, in a step: 3",
            "largest logits picked out on the GPU: 7",
            "KV cache bfloat16",
            "made by python 3.11",
            "layers 2",
            "vocabulary 50, tied",
            "engine.plan 2.00 KiB",
            "total 2.00 KiB",
        ):
            assert line in lines

    def test_json_holds_the_manifest(self, invoke: Callable[..., Result], folder: Path) -> None:
        report = json.loads(invoke("inspect", folder, "--json").stdout)

        assert report["kind"] == "engine"
        assert report["plans"] == {"engine.plan": 2048}
        assert report["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
        assert report["manifest"] == json.loads((folder / "engine.json").read_text())

    def test_a_damaged_one(self, invoke: Callable[..., Result], folder: Path) -> None:
        (folder / "engine.plan").unlink()

        result = invoke("inspect", folder)

        assert result.exit_code == 1
        assert "engine.plan is missing" in result.stderr

    @pytest.mark.parametrize("option", ["--max-seq-len", "--batch-size"])
    def test_its_sizes_are_fixed(
        self, option: str, invoke: Callable[..., Result], folder: Path
    ) -> None:
        result = invoke("inspect", folder, option, 50)

        assert result.exit_code == 2
        assert "is an engine, whose sizes are fixed" in result.stderr


class TestCheckpoint:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("gemma1-untied", "Gemma 1, "),
            ("gemma2", "Gemma 2, "),
            ("gemma3", "3, 2 with a window of 8 tokens"),
        ],
    )
    def test_shows_the_model(
        self,
        name: str,
        text: str,
        invoke: Callable[..., Result],
        tiny_checkpoint: Callable[..., Path],
    ) -> None:
        result = invoke("inspect", tiny_checkpoint(name))

        assert result.exit_code == 0
        assert result.stdout.startswith("Checkpoint ")
        assert text in result.stdout


class TestNeither:
    def test_says_what_was_expected(self, invoke: Callable[..., Result], tmp_path: Path) -> None:
        result = invoke("inspect", tmp_path)

        assert result.exit_code == 2
        assert f"{tmp_path} has no config.json; it holds nothing" in result.stderr
        assert "A bundle (manifest.json) or an engine (engine.json) would do, too" in result.stderr

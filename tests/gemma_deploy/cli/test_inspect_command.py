import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result


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
        assert short["cpu_total_bytes"] == short["cpu_weights_bytes"] + activations_and_cache

    def test_longer_than_the_model(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke("inspect", bundle, "--max-seq-len", 9000)

        assert result.exit_code == 2
        assert "max_seq_len is 9000" in result.stderr


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

        assert result.exit_code == 1
        assert "expected a bundle (manifest.json) or a checkpoint (config.json)" in result.stderr

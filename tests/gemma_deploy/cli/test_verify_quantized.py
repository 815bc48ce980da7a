import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result

from gemma_deploy import api
from gemma_deploy.exporters.quantization.options import QuantizationOptions
from gemma_deploy.file_records import record_file
from gemma_deploy.tokenizer import GemmaTokenizer

TINY_GEMMA = Path(__file__).parents[3] / "samples" / "tiny-gemma"


@pytest.fixture(scope="module")
def quantized(bundle_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in int4 and int8."""
    return api.export(
        bundle_checkpoint,
        tmp_path_factory.mktemp("quantized") / "bundle",
        quantization=QuantizationOptions(embedding_bits=8, method="rtn"),
        graphs=["tensorrt"],
        is_calibrated=False,
    ).folder


class TestWholeBundle:
    # Widened graphs are allowed ten times as much, for a factor that 16 bits hold exactly here.
    @pytest.mark.parametrize(("lowering", "share"), [("onnxruntime", 1.0), ("tensorrt", 0.1)])
    def test_its_graphs_agree_with_its_own_weights(
        self,
        lowering: str,
        share: float,
        invoke: Callable[..., Result],
        quantized: Path,
        bundle_checkpoint: Path,
    ) -> None:
        result = invoke(
            "verify", quantized, "--checkpoint", bundle_checkpoint, "--graph", lowering, "--json"
        )

        assert result.exit_code == 0, result.output
        checks = json.loads(result.stdout)["checks"]
        assert "quantized by rtn: 21 in int4/32, 1 in int8/32" in checks[0]["detail"]
        parity = [check["parity"] for check in checks if check["parity"]]
        assert len(parity) == 5
        for figures in parity:
            # Up to 1e-4 of the largest logit, as sums in another order are off. Rounding activations to
            # 8 bits, as the bundle's own graphs do, goes far beyond.
            assert figures["max_abs_difference"] <= share * figures["tolerance"]

    def test_the_distance_is_that_of_the_bundle_as_it_runs(
        self,
        invoke: Callable[..., Result],
        quantized: Path,
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        text = "You may reproduce and distribute copies of the Work in any medium. " * 3
        (tmp_path / "text").write_text(text)
        options = ("--checkpoint", bundle_checkpoint, "--text", tmp_path / "text", "--json")

        result = invoke("verify", quantized, *options)

        distance = json.loads(result.stdout)["checks"][-1]["distance"]
        found = self.distance(invoke, quantized, bundle_checkpoint, tmp_path / "text")
        read = len(GemmaTokenizer.from_pretrained(quantized).encode(text))
        assert distance["positions"] == read
        # `evaluate` reads one token less: nothing follows the last.
        assert distance["mean_kl_nats"] == pytest.approx(found["kl_mean_nats"], rel=0.1)
        assert distance["max_kl_nats"] >= found["kl_max_nats"] * 0.999
        assert 0 < distance["greedy_agreement"] <= 1

    def distance(
        self, invoke: Callable[..., Result], bundle: Path, checkpoint: Path, text: Path
    ) -> dict[str, float]:
        result = invoke("evaluate", bundle, "--text", text, "--reference", checkpoint, "--json")
        found: dict[str, float] = json.loads(result.stdout)
        return found

    def test_the_distance_can_be_bounded(
        self, invoke: Callable[..., Result], quantized: Path, bundle_checkpoint: Path
    ) -> None:
        base = ("verify", quantized, "--checkpoint", bundle_checkpoint, "--max-kl")

        strict, lax = invoke(*base, 1e-9), invoke(*base, 1e9)

        assert strict.exit_code == 1
        assert "FAIL  distance, from the checkpoint: KL" in strict.stdout
        assert "(at most 1e-09 allowed)" in strict.stdout
        assert strict.stdout.count("ok    parity, ") == 5
        assert lax.exit_code == 0

    def test_bounding_needs_a_checkpoint(
        self, invoke: Callable[..., Result], quantized: Path
    ) -> None:
        result = invoke("verify", quantized, "--max-kl", 1)

        assert result.exit_code == 2
        assert "--max-kl and --text compare logits: give --checkpoint too" in result.stderr


class TestInt8Cache:
    def test_its_graphs_agree_with_rounded_keys_and_values(
        self, invoke: Callable[..., Result], tmp_path: Path
    ) -> None:
        """Of weights that are exact, so that only the cache is between them and float32."""
        folder = tmp_path / "bundle"
        exported = invoke(
            "export", TINY_GEMMA, "--output", folder, "--fp32", "--cache-dtype", "int8"
        )

        result = invoke("verify", folder, "--checkpoint", TINY_GEMMA, "--tokens", 96, "--json")

        assert exported.exit_code == result.exit_code == 0, exported.output + result.output
        checks = json.loads(result.stdout)["checks"]
        parity = [check["parity"] for check in checks if check["parity"]]
        assert len(parity) == 5
        distance = checks[-1]["distance"]
        assert distance["mean_kl_nats"] > 0
        # A few codes fall to the other side; that is little beside rounding all of them.
        for figures in parity:
            assert figures["mean_kl_nats"] < 0.1 * distance["mean_kl_nats"]


class TestDamage:
    def test_scales_of_another_place(
        self,
        invoke: Callable[..., Result],
        quantized: Path,
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        changed = shutil.copytree(quantized, tmp_path / "changed")
        path = changed / "decode.onnx"
        model = onnx.load(path, load_external_data=False)
        tensor = next(
            x for x in model.graph.initializer if x.name.endswith("down_proj.weight.scales")
        )
        (offset,) = (entry for entry in tensor.external_data if entry.key == "offset")
        offset.value = str(int(offset.value) - 2 * 64)
        path.write_bytes(model.SerializeToString())
        rerecord(path)

        result = invoke("verify", changed, "--checkpoint", bundle_checkpoint)

        assert result.exit_code == 1
        assert "ok    parity, prefill graph, whole text" in result.stdout
        assert "FAIL  parity, decode graph, token by token" in result.stdout

    def test_weights_that_are_no_numbers(
        self,
        invoke: Callable[..., Result],
        quantized: Path,
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        from safetensors.torch import load_file

        changed = shutil.copytree(quantized, tmp_path / "changed")
        path = changed / "weights.safetensors"
        scales = load_file(path)["model.layers.0.mlp.down_proj.weight.scales"]
        place = path.read_bytes().index(scales.numpy().tobytes())
        with path.open("r+b") as file:
            file.seek(place)
            file.write(torch.full_like(scales, np.nan).numpy().tobytes())
        rerecord(path)

        result = invoke("verify", changed, "--checkpoint", bundle_checkpoint)

        assert result.exit_code == 1
        assert "FAIL  weights: the weights of" in result.stdout
        assert "give logits that are NaN or infinite in float32" in result.stdout


def rerecord(path: Path) -> None:
    """Make the manifest vouch for a file as it is now."""
    manifest_path = path.parent / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["files"][path.name] = dataclasses.asdict(record_file(path))
    manifest_path.write_text(json.dumps(manifest))

"""Formats, calibration and what an export does with them, on the small trained model."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import (
    CheckpointError,
    ExportError,
    GemmaDeployWarning,
    RequestError,
)
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.exporters.quantization.options import METHODS, Method, QuantizationOptions
from gemma_deploy.exporters.quantization.prepare import PreparedWeights, possible_options, prepare
from gemma_deploy.graph_spec import Precision
from gemma_deploy.quantization.formats import Scheme
from gemma_deploy.tokenizer import GemmaTokenizer

TINY_GEMMA = Path(__file__).parents[3] / "samples" / "tiny-gemma"
# One layer is enough to see what happens to results.
ONE_LAYER = ("0-3", "embeddings")


def prepared(folder: Path, **options: Any) -> PreparedWeights:
    return prepare(
        Checkpoint.open(TINY_GEMMA),
        GemmaTokenizer.from_pretrained(TINY_GEMMA),
        QuantizationOptions(**options),
        Precision.of_quantized(None),
        text=None,
        folder=folder,
        on_progress=lambda *_: None,
    )


def test_rounding_needs_no_text_and_no_folder(tmp_path: Path) -> None:
    found = prepared(tmp_path / "work", scheme="int8")
    assert found.method == "rtn"
    assert len(found.formats) == 5 * 7 + 1
    assert not found.prepared
    assert not (tmp_path / "work").exists()


def test_formats_are_chosen_under_a_size(tmp_path: Path) -> None:
    """4.5 bits for each of 3,312,384 weights."""
    budget = 3_312_384 * 9 // 16
    found = prepared(tmp_path, is_automatic=True, method="rtn", max_size_bytes=budget)
    assert found.method == "rtn"
    assert {x.name: x.format for x in found.choices} == found.formats
    norms = 11 * 256 * 4
    assert 0.99 * budget < sum(x.size_bytes for x in found.choices) + norms <= budget
    assert len(set(found.formats.values())) > 1


@pytest.mark.parametrize(
    ("options", "asked"),
    [({"method": "gptq"}, "--method gptq"), ({"is_automatic": True, "max_kl_nats": 1}, "--auto")],
)
def test_calibration_without_a_tokenizer(
    tiny_checkpoint: Any, tmp_path: Path, options: dict[str, Any], asked: str
) -> None:
    message = rf"{asked} calibrates on text, and .* has no tokenizer\.json: add the tokenizer's"
    with pytest.raises(RequestError, match=message):
        export_checkpoint(
            tiny_checkpoint("gemma1"),
            tmp_path / "bundle",
            quantization=QuantizationOptions(**options),
        )
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("method", ["imatrix", "gptq"])
def test_calibration_that_was_forbidden(tmp_path: Path, method: Method) -> None:
    message = f"--method {method} calibrates on text, and --no-calibration forbids it: drop one"
    with pytest.raises(RequestError, match=message):
        export_checkpoint(
            TINY_GEMMA,
            tmp_path / "bundle",
            quantization=QuantizationOptions(method=method),
            is_calibrated=False,
        )


def test_the_default_rounds_where_it_cannot_read_text(tiny_checkpoint: Any, tmp_path: Path) -> None:
    with pytest.warns(GemmaDeployWarning, match=r"rounded to nearest .* has no tokenizer\.json"):
        untold = export_checkpoint(
            tiny_checkpoint("gemma1"), tmp_path / "untold", quantization=QuantizationOptions()
        )
    assert untold.manifest.method == "rtn"
    forbidden = possible(is_calibrated=False)
    assert forbidden == QuantizationOptions(method="rtn")


@pytest.mark.parametrize("scheme", ["int8", "nf4", "fp8"])
def test_other_schemes_are_rounded_without_a_word(scheme: Scheme) -> None:
    assert possible(scheme=scheme, is_calibrated=False).chosen_method == "rtn"


def possible(*, is_calibrated: bool, **options: Any) -> QuantizationOptions:
    """Return what is made of options, and check that a warning says if that is something else."""
    asked = QuantizationOptions(**options)
    tokenizer = GemmaTokenizer.from_pretrained(TINY_GEMMA)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = possible_options(asked, TINY_GEMMA, tokenizer, is_calibrated=is_calibrated)
    assert bool(caught) == (found != asked)
    return found


def test_the_default_of_int4_searches_scales_and_leaves_no_folder(tmp_path: Path) -> None:
    bundle = export_checkpoint(TINY_GEMMA, tmp_path / "bundle", quantization=QuantizationOptions())
    assert bundle.manifest.method == "imatrix"
    assert [x.name for x in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    with pytest.raises(ExportError, match="calibration keeps what it has done, holds something el"):
        prepared(tmp_path / "work", method="gptq", keep=ONE_LAYER, calibration_tokens=512)
    assert (tmp_path / "work" / "thesis.txt").read_text() == "mine"


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "gptq", "keep": ONE_LAYER, "calibration_tokens": 512}
    found = prepared(tmp_path / "work", **options)
    assert found.work is not None
    found.work.close()
    path = tmp_path / "work" / "layer-4.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert prepared(tmp_path / "work", **options).prepared == found.prepared
    assert path.read_bytes() == whole


def test_an_interrupted_quick_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("reading the text", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(
            TINY_GEMMA,
            tmp_path / "bundle",
            quantization=QuantizationOptions(),
            on_progress=interrupt,
        )
    assert not list(tmp_path.iterdir())


def test_tokens_of_a_method_that_reads_none() -> None:
    with pytest.raises(
        RequestError, match="--calibration-tokens with --method rtn, which reads no"
    ):
        QuantizationOptions(scheme="int8", calibration_tokens=4096)


def test_auto_chooses_block_sizes_itself() -> None:
    with pytest.raises(RequestError, match="--auto chooses block sizes itself: drop --block-size"):
        QuantizationOptions(is_automatic=True, max_kl_nats=1, block_size=64)


def test_a_float16_cache_is_looked_after_too(tmp_path: Path) -> None:
    """Attention is computed in the cache's dtype."""
    bundle = export_checkpoint(
        TINY_GEMMA, tmp_path / "bundle", dtype="float32", cache_dtype="float16"
    )
    assert bundle.overflow_report() is not None


def test_an_export_continues_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = QuantizationOptions(method="gptq", keep=ONE_LAYER, calibration_tokens=512)

    def interrupt(stage: str, *_: int) -> None:
        if stage == "writing weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(
            TINY_GEMMA, tmp_path / "bundle", quantization=options, on_progress=interrupt
        )
    assert sorted(x.name for x in tmp_path.iterdir()) == ["bundle.calibration"]

    def fail(*_: object) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr("gemma_deploy.exporters.quantization.gptq_run.Gptq", fail)
    bundle = export_checkpoint(TINY_GEMMA, tmp_path / "bundle", quantization=options)
    assert [x.name for x in tmp_path.iterdir()] == ["bundle"]
    assert bundle.manifest.method == "gptq"
    assert len(bundle.manifest.formats) == 7


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_beyond_all_bounds_ends_the_export(tmp_path: Path, method: Method) -> None:
    folder = shutil.copytree(TINY_GEMMA, tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e25
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options = QuantizationOptions(
        method=method, calibration_tokens=None if method == "rtn" else 2048
    )
    with pytest.raises((CheckpointError, ExportError), match=r"too large|damaged"):
        export_checkpoint(folder, tmp_path / "out", graphs=["onnxruntime"], quantization=options)
    assert not (tmp_path / "out").exists()

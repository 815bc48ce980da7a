"""The oracle is transformers in float64, given what numpy reads out of the weights file."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.errors import BundleError, CheckpointError, ExportError, RequestError
from gemma_deploy.exporters.calibration import divergence as module
from gemma_deploy.exporters.calibration.divergence import (
    MEASURED_TOKENS,
    measure_divergence,
    measured_rows,
)
from gemma_deploy.exporters.calibration.text import default_text, held_out_text
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.exporters.quantization.options import QuantizationOptions, formats_of
from gemma_deploy.exporters.weights import plan_weights, write_weights
from gemma_deploy.graph_spec import DType, Precision
from gemma_deploy.model.bundle_weights import BundleWeights
from gemma_deploy.quantization.codes import NF4_TABLE
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.residual_scaling import LayerScaling, ResidualScaling
from gemma_deploy.tokenizer import GemmaTokenizer

TINY_GEMMA = Path(__file__).parents[3] / "samples" / "tiny-gemma"
SCALED = LayerScaling(value=2, attention=4, up=8, feed_forward=16)

Written = tuple[Checkpoint, dict[str, WeightFormat], ResidualScaling | None, Path]


@pytest.fixture
def written(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Callable[..., Written]:
    """Return `written(name, scheme, dtype="float32", is_scaled=False)`: weights on disk."""

    def get(name: str, scheme: str, dtype: DType = "float32", is_scaled: bool = False) -> Written:
        checkpoint = Checkpoint.open(tiny_checkpoint(name))
        formats = formats_of(checkpoint.config, QuantizationOptions(scheme=scheme))  # type: ignore[arg-type]  # tests name schemes that exist
        layers = (SCALED,) * checkpoint.config.num_hidden_layers
        scaling = ResidualScaling.of(checkpoint.config, 32, layers) if is_scaled else None
        plan = plan_weights(checkpoint, Precision.of(dtype), formats, scaling)
        write_weights(checkpoint, plan, tmp_path / "weights.safetensors")
        return checkpoint, formats, scaling, tmp_path / "weights.safetensors"

    return get


@pytest.mark.parametrize(
    "arguments",
    [
        ("gemma1", "int4", "float32", False),
        ("gemma1-mha-bias", "int8", "float16", True),
        ("gemma1-untied", "int4", "bfloat16", False),
        ("gemma2", "nf4", "float32", False),
        ("gemma2", "int4", "float16", True),
        ("gemma3", "int8", "float32", False),
        ("gemma3", "fp8", "float16", True),
    ],
)
def test_it_is_that_of_whole_models_in_float64(
    written: Callable[..., Written],
    random_tokens: Callable[..., Tensor],
    oracle: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, str, str, bool],
) -> None:
    monkeypatch.setattr(module, "_LOGITS_BYTES", 100 * 72 * 8)  # 512 tokens in blocks of 100
    checkpoint, formats, scaling, path = written(*arguments)
    rows = random_tokens(3, 24)  # beyond the windows of 8

    found = measure_divergence(checkpoint, BundleWeights(path, formats, scaling), rows)

    original = copy.deepcopy(oracle(checkpoint.folder)).double()
    own = log_probabilities(original, rows)
    original.load_state_dict(read_by_numpy(path, formats, scaling), strict=False)
    other = log_probabilities(original, rows)
    expected = float((own.exp() * (own - other)).sum(-1).mean())
    assert expected > 1e-6
    assert found.mean_kl_nats == pytest.approx(expected, rel=1e-4)
    assert found.same_top1 == float((own.argmax(-1) == other.argmax(-1)).double().mean())
    assert found.num_tokens == 72


def log_probabilities(model: Any, rows: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(rows).logits, -1)


def read_by_numpy(
    path: Path, formats: dict[str, WeightFormat], scaling: ResidualScaling | None
) -> dict[str, Tensor]:
    """Return a transformers state dict, float64, of what docs/bundle.md says of the file."""
    stored = load_file(path)
    state: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        if key.endswith(".weight.scales"):
            continue
        if key.endswith("norm.scale"):
            name = key.removesuffix("scale") + "weight"
            divisor = 1.0 if scaling is None else scaling.norm_divisor(name)
            state[name] = tensor.double() * divisor - 1
            continue
        divisor = 1.0 if scaling is None else scaling.weight_divisor(key)
        values = tensor.double()
        if key in formats:
            values = decoded(tensor, formats[key].scheme)
            scales = stored[f"{key}.scales"].double()
            values = values * scales.repeat_interleave(values.shape[1] // scales.shape[1], 1)
        state[key] = values * divisor
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def decoded(codes: Tensor, scheme: str) -> Tensor:
    """Return codes [N, K] as float64."""
    if scheme not in ("int4", "nf4"):
        return codes.double()
    raw = codes.numpy()
    low, high = raw & 15, raw >> 4
    if scheme == "nf4":
        nibbles = np.stack((high, low), -1).reshape(len(raw), -1)
        return torch.from_numpy(np.array(NF4_TABLE, np.float32)[nibbles]).double()
    nibbles = np.stack((low, high), -1).reshape(len(raw), -1).astype(np.int8)
    return torch.from_numpy(nibbles - 16 * (nibbles > 7)).double()


def test_weights_as_they_were_diverge_by_nothing(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], random_tokens: Callable[..., Tensor]
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gemma3"))
    path = tmp_path / "weights"
    write_weights(checkpoint, plan_weights(checkpoint, Precision.of("float32"), {}), path)

    found = measure_divergence(checkpoint, BundleWeights(path, {}, None), random_tokens(2, 16))

    assert found.mean_kl_nats == 0
    assert found.same_top1 == 1


def test_a_flipped_scale_shows(
    written: Callable[..., Written], random_tokens: Callable[..., Tensor]
) -> None:
    checkpoint, formats, scaling, path = written("gemma3", "int8")
    before = measure_divergence(
        checkpoint, BundleWeights(path, formats, scaling), random_tokens(2, 16)
    )
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight.scales"][3] *= -1
    save_file(tensors, path)

    after = measure_divergence(
        checkpoint, BundleWeights(path, formats, scaling), random_tokens(2, 16)
    )

    assert after.mean_kl_nats > 10 * before.mean_kl_nats


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_written_weights_that_are_no_numbers(
    written: Callable[..., Written], random_tokens: Callable[..., Tensor], name: str
) -> None:
    checkpoint, formats, scaling, path = written("gemma1-untied", "int8")
    tensors = load_file(path)
    tensors[f"{name}.scales"][0] = torch.nan
    save_file(tensors, path)

    with pytest.raises(ExportError, match="as they were written give logits that are NaN"):
        measure_divergence(checkpoint, BundleWeights(path, formats, scaling), random_tokens(1, 16))


def test_a_checkpoint_whose_logits_are_no_numbers(
    written: Callable[..., Written], random_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    checkpoint, formats, scaling, path = written("gemma1", "int8")
    folder = tmp_path / "huge"
    shutil.copytree(checkpoint.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e37
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match="the checkpoint itself gives logits"):
        measure_divergence(
            Checkpoint.open(folder), BundleWeights(path, formats, scaling), random_tokens(1, 16)
        )


def test_a_weights_file_that_lacks_a_tensor(
    written: Callable[..., Written], random_tokens: Callable[..., Tensor]
) -> None:
    checkpoint, formats, scaling, path = written("gemma1", "int8")
    tensors = load_file(path)
    del tensors["model.norm.scale"]
    save_file(tensors, path)

    with pytest.raises(BundleError, match=r"model\.norm\.scale cannot be read"):
        measure_divergence(checkpoint, BundleWeights(path, formats, scaling), random_tokens(1, 16))


class TestMeasuredRows:
    tokenizer = GemmaTokenizer.from_pretrained(TINY_GEMMA)
    config = Checkpoint.open(TINY_GEMMA).config

    def test_the_built_in_text_is_not_the_calibration_text(self) -> None:
        rows = measured_rows(self.tokenizer, None, self.config)

        assert rows is not None
        assert rows.numel() == MEASURED_TOKENS
        paragraphs = [x for x in held_out_text().split("\n\n") if x]
        assert len(paragraphs) > 8
        assert not [x for x in paragraphs if x in default_text()]

    def test_of_a_given_text_the_end_is_read(self) -> None:
        words = [f"{n} houses. " for n in range(2000)]
        text = "".join(words)

        rows = measured_rows(self.tokenizer, text, self.config)

        assert rows is not None
        row, *others = rows.tolist()
        assert not others
        assert row[0] == self.tokenizer.bos_token_id
        assert row[1:] == self.tokenizer.encode(text, add_bos=False)[-511:]

    def test_a_text_that_is_too_short(self) -> None:
        assert measured_rows(self.tokenizer, "a", self.config) is None

    def test_tokens_that_the_model_does_not_have(self) -> None:
        config = copy.copy(self.config)
        object.__setattr__(config, "vocab_size", 20)

        with pytest.raises(
            RequestError, match=r"has embeddings of 20: .* or export with --no-calibration"
        ):
            measured_rows(self.tokenizer, None, config)


def test_the_manifest_of_an_export_says_what_was_measured(tmp_path: Path) -> None:
    """Of weights that calibration made, in float16."""
    said: list[str] = []

    bundle = export_checkpoint(
        TINY_GEMMA,
        tmp_path / "bundle",
        quantization=QuantizationOptions(scheme="int4", method="gptq", calibration_tokens=2048),
        dtype="float16",
        on_progress=lambda stage, *_: said.append(stage),
    )

    rows = measured_rows(GemmaTokenizer.from_pretrained(bundle.folder), None, bundle.config)
    assert rows is not None
    again = measure_divergence(
        Checkpoint.open(TINY_GEMMA),
        BundleWeights(bundle.weights_path, bundle.manifest.formats, bundle.manifest.scaling),
        rows,
    )
    assert bundle.manifest.divergence is not None
    assert bundle.manifest.divergence.mean_kl_nats == pytest.approx(again.mean_kl_nats, rel=1e-6)
    assert 0.001 < again.mean_kl_nats < 0.1
    assert "measuring the distance from the original" in said

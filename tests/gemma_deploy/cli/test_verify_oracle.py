"""`verify --checkpoint` may not believe the reader that it checks."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from gemma_deploy import api, config_json
from gemma_deploy.config import RopeParameters
from gemma_deploy.exporters.quantization.options import QuantizationOptions

Invoke = Callable[..., Result]
SAVED = "model.safetensors"


@pytest.fixture
def copy(bundle_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(bundle_checkpoint, tmp_path / "checkpoint"))


def add(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(folder / SAVED) | tensors, folder / SAVED, metadata={"format": "pt"})


def test_the_reference_is_transformers(
    invoke: Invoke, bundle: Path, bundle_checkpoint: Path
) -> None:
    result = invoke("verify", bundle, "--checkpoint", bundle_checkpoint)

    assert result.exit_code == 0, result.stdout
    assert "ok    reference: transformers 5" in result.stdout
    num_tensors = len(load_file(bundle_checkpoint / SAVED))
    assert f"ok    tensors: {num_tensors} are the text model's, which uses" in result.stdout


@pytest.fixture
def misread(bundle_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose exporter read another rotary base than config.json states, as the reader still does."""
    monkeypatch.setattr(config_json, "_rope_parameters", lambda _: RopeParameters(rope_theta=123.0))
    return api.export(bundle_checkpoint, tmp_path / "misread").folder


def test_a_fault_of_the_reader_shows_as_a_difference(
    invoke: Invoke, misread: Path, bundle_checkpoint: Path
) -> None:
    result = invoke("verify", misread, "--checkpoint", bundle_checkpoint)

    assert result.exit_code == 1
    assert "FAIL  parity, prefill graph, whole text" in result.stdout


def test_a_fault_of_the_reader_shows_in_a_quantized_bundle_too(
    invoke: Invoke, bundle_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_json, "_rope_parameters", lambda _: RopeParameters(rope_theta=123.0))
    options = QuantizationOptions(scheme="int8")
    misread = api.export(bundle_checkpoint, tmp_path / "misread", quantization=options).folder

    result = invoke("verify", misread, "--checkpoint", bundle_checkpoint)

    assert result.exit_code == 1
    assert "FAIL  reading, of the checkpoint" in result.stdout


def test_without_transformers_it_is_said_that_such_a_fault_does_not_show(
    invoke: Invoke, misread: Path, bundle_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    result = invoke("verify", misread, "--checkpoint", bundle_checkpoint)

    assert result.exit_code == 0, result.stdout
    assert "reference: gemma-deploy's own model, eager in float32, for transformers is not" in (
        result.stdout
    )
    assert "a fault in that reading does not show here" in result.stdout
    assert "ok    tensors: " in result.stdout


def test_an_export_without_the_stored_head_fails(invoke: Invoke, bundle: Path, copy: Path) -> None:
    table = load_file(copy / SAVED)["model.embed_tokens.weight"]
    add(copy, **{"lm_head.weight": table.flip(0)})

    result = invoke("verify", bundle, "--checkpoint", copy)

    assert result.exit_code == 1
    assert result.stderr.count("that is the head") == 1
    assert "its tie_word_embeddings is False, the bundle's True" in result.stdout


def test_a_tensor_left_unread_fails_without_transformers_too(
    invoke: Invoke, bundle: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    add(copy, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(256)})

    result = invoke("verify", bundle, "--checkpoint", copy)

    assert result.exit_code == 1
    assert "FAIL  checkpoint: " in result.stdout
    assert "q_proj.bias" in result.stdout


def test_names_that_transformers_does_not_find_are_said(
    invoke: Invoke, bundle: Path, copy: Path
) -> None:
    tensors = {f"_orig_mod.{name}": x for name, x in load_file(copy / SAVED).items()}
    save_file(tensors, copy / SAVED, metadata={"format": "pt"})

    result = invoke("verify", bundle, "--checkpoint", copy)

    assert result.exit_code == 0, result.stdout
    assert result.stderr.count("was taken off") == 1
    assert " does not find " in result.stdout


def test_a_head_that_transformers_leaves_out_is_said(
    invoke: Invoke, copy: Path, tmp_path: Path
) -> None:
    table = load_file(copy / SAVED)["model.embed_tokens.weight"]
    add(copy, **{"_orig_mod.lm_head.weight": table.flip(0)})
    wrapped = pytest.warns(UserWarning, match="_orig_mod., which a wrapper put into the names")
    with wrapped, pytest.warns(UserWarning, match="that is the head"):
        bundle = api.export(copy, tmp_path / "bundle").folder

    result = invoke("verify", bundle, "--checkpoint", copy)

    assert result.exit_code == 0, result.stdout
    assert "leaves out _orig_mod.lm_head.weight" in result.stdout


def test_a_config_that_transformers_refuses_is_said(
    invoke: Invoke, bundle: Path, copy: Path
) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1, "head_dim": 64}))
    raw = json.loads((bundle / "manifest.json").read_text())
    changed = Path(shutil.copytree(bundle, copy.with_name("bundle")))
    raw["model"]["rms_norm_eps"] = 1
    (changed / "manifest.json").write_text(json.dumps(raw))

    result = invoke("verify", changed, "--checkpoint", copy)

    assert "cannot run it (" in result.stdout
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_what_is_left_out_is_counted(invoke: Invoke, bundle: Path, copy: Path) -> None:
    add(copy, **{"model.rotary_emb.inv_freq": torch.ones(2), "vision_tower.a": torch.ones(1)})

    result = invoke("verify", bundle, "--checkpoint", copy, "--json")

    details = {check["name"]: check["detail"] for check in json.loads(result.stdout)["checks"]}
    assert "left out: " in details["tensors"]
    assert "1 of vision and audio towers" in details["tensors"]
    assert "1 of rotary frequencies" in details["tensors"]

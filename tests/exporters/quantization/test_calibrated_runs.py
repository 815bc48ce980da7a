"""What run_gptq and run_awq share: never worse than rounding, and continued where they stopped."""

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
from gemma_deploy.exporters.calibration.layer_walk import LayerWalk
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.exporters.quantization.awq import AwqLayer, run_awq
from gemma_deploy.exporters.quantization.gptq_run import run_gptq
from gemma_deploy.exporters.quantization.options import Method, QuantizationOptions, formats_of
from gemma_deploy.exporters.quantization.stages import Stage, StagedStream, stage_inputs, stages_of
from gemma_deploy.exporters.quantization.work_folder import WorkFolder
from gemma_deploy.model.transformer import GemmaDecoderLayer
from gemma_deploy.quantization.codes import Quantized, dequantize, quantize, unpack
from gemma_deploy.quantization.formats import WeightFormat, scales_name

TinyFolders = Callable[..., Path]
Run = Callable[..., dict[str, Path]]
RUNS = [run_gptq, run_awq]
TINY_GEMMA = Path(__file__).parents[3] / "samples" / "tiny-gemma"


def load_into(model: Any, prepared: dict[str, Path], formats: dict[str, WeightFormat]) -> None:
    """Give a transformers model the weights that the files stand for."""
    parameters = dict(model.named_parameters())
    for name, path in prepared.items():
        parts = load_file(path)
        if name in formats:
            codes = unpack(parts[name], formats[name])
            values = dequantize(Quantized(codes, parts[scales_name(name)]), formats[name])
            parameters[name].data.copy_(values)
        else:
            parameters[name.removesuffix(".scale") + ".weight"].data.copy_(parts[name] - 1)


def divergence(model: Any, reference: Tensor, rows: Tensor) -> float:
    with torch.no_grad():
        found = model(rows).logits.double().log_softmax(-1)
    return float((reference.exp() * (reference - found)).sum(-1).mean())


@pytest.mark.parametrize("name", ["gemma1", "gemma3"])
def test_gptq_is_closer_to_the_model_than_rounding_to_nearest(
    tiny_checkpoint: TinyFolders,
    oracle: Callable[..., Any],
    random_tokens: Callable[..., Any],
    tmp_path: Path,
    name: str,
) -> None:
    folder = tiny_checkpoint(name)
    checkpoint = Checkpoint.open(folder)
    rows = torch.as_tensor(random_tokens(16, 32))
    formats = formats_of(checkpoint.config, QuantizationOptions(scheme="int4"))
    # Changed below, and the oracle's models are everybody's.
    model, plain = (copy.deepcopy(oracle(folder)) for _ in range(2))
    with torch.no_grad():
        reference = model(rows).logits.double().log_softmax(-1)
    work = WorkFolder(tmp_path / "work", {})
    prepared = run_gptq(checkpoint, rows, formats, work, lambda *_: None)
    assert formats.keys() <= prepared.keys()
    load_into(model, prepared, formats)
    calibrated = divergence(model, reference, rows)

    parameters = dict(plain.named_parameters())
    for matrix, weight_format in formats.items():
        weight = parameters[matrix].data
        weight.copy_(dequantize(quantize(weight.float(), weight_format), weight_format))
    assert calibrated < divergence(plain, reference, rows)


@pytest.mark.parametrize("source", ["input_layernorm", "self_attn.v_proj", "mlp.up_proj"])
def test_awq_is_never_worse_than_rounding_on_what_a_layer_reads(
    tiny_checkpoint: TinyFolders, random_tokens: Callable[..., Any], source: str
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gemma1"))
    walk = LayerWalk(checkpoint, torch.as_tensor(random_tokens(16, 32)))
    layer = walk.layer(0)
    stage = next(stage for stage in stages_of(layer) if stage.source == source)
    # Only this stage, and the projection that it is folded into.
    folded_into = [source] if source.endswith("_proj") else []
    chosen = {name: WeightFormat("int4", 32) for name in (*stage.matrices, *folded_into)}
    parts = AwqLayer(walk, walk.layer(0), chosen).quantize()
    awq, nearest = walk.layer(0), walk.layer(0)
    with torch.no_grad():
        for name, weight_format in chosen.items():
            stored = f"{name}.weight"
            codes = Quantized(unpack(parts[stored], weight_format), parts[scales_name(stored)])
            awq.get_parameter(stored).copy_(dequantize(codes, weight_format))
            weight = nearest.get_parameter(stored)
            weight.copy_(dequantize(quantize(weight, weight_format), weight_format))
        for name in [part for part in parts if part.endswith(".scale")]:
            awq.get_parameter(name.replace(".scale", ".weight")).copy_(parts[name] - 1)
        wanted = stage_outputs(walk, layer, stage)
        losses = [(stage_outputs(walk, x, stage) - wanted).square().sum() for x in (awq, nearest)]
    # A projection's scales are divided in float16, which moves the input a little.
    assert losses[0] <= losses[1] * (1.02 if folded_into else 1.0)


def stage_outputs(walk: LayerWalk, layer: GemmaDecoderLayer, stage: Stage) -> Tensor:
    """Return what a stage's matrices give, side by side, [tokens, sum of N]."""
    inputs = torch.cat([run.inputs for run in stage_inputs(walk, layer, stage, walk.hidden)])
    weights = [layer.get_parameter(f"{name}.weight").data for name in stage.matrices]
    return inputs @ torch.cat(weights).T


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("run", RUNS)
def test_an_interrupted_run_continues_and_gives_the_same_bytes(
    tiny_checkpoint: TinyFolders, random_tokens: Callable[..., Any], tmp_path: Path, run: Run
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gemma1"))
    rows = torch.as_tensor(random_tokens(8, 16))
    formats = formats_of(checkpoint.config, QuantizationOptions(scheme="int4"))
    whole = run(checkpoint, rows, formats, WorkFolder(tmp_path / "whole", {}), lambda *_: None)

    def stop_at_layer_1(what: str, done: int, _total: int) -> None:
        if what == "quantizing layers" and done == 1:
            raise StoppedError

    with pytest.raises(StoppedError), WorkFolder(tmp_path / "work", {}) as work:
        run(checkpoint, rows, formats, work, stop_at_layer_1)
    kept = {
        path.name: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.safetensors")
    }
    assert "layer-0.safetensors" in kept
    continued = run(checkpoint, rows, formats, WorkFolder(tmp_path / "work", {}), lambda *_: None)
    assert continued.keys() == whole.keys()
    for name, path in continued.items():
        assert path.read_bytes() == whole[name].read_bytes(), name
    for name, time_ns in kept.items():
        assert (tmp_path / "work" / name).stat().st_mtime_ns == time_ns


def test_what_is_kept_dense_stays_out_of_awq(
    tiny_checkpoint: TinyFolders, random_tokens: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("gemma1"))
    options = QuantizationOptions(scheme="int4", keep=("q_proj", "0.up_proj"))
    formats = formats_of(checkpoint.config, options)
    rows = torch.as_tensor(random_tokens(8, 16))
    prepared = run_awq(checkpoint, rows, formats, WorkFolder(tmp_path / "w", {}), lambda *_: None)
    assert not any("q_proj" in name for name in prepared)
    # Its norm feeds a dense matrix too, so that nothing may be folded into it.
    assert not any("input_layernorm" in name for name in prepared)
    assert "model.layers.0.post_attention_layernorm.scale" not in prepared


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_a_staged_stream_sees_and_does_what_the_layer_does(
    tiny_checkpoint: TinyFolders, random_tokens: Callable[..., Any], name: str
) -> None:
    walk = LayerWalk(Checkpoint.open(tiny_checkpoint(name)), torch.as_tensor(random_tokens(7, 16)))
    walk.rows_at_once = 3
    layer = walk.layer(0)
    stream = walk.hidden.clone()
    staged = StagedStream(walk, layer, stream)
    for stage in stages_of(layer):
        # One after the other: both hook into the layer.
        wanted = list(stage_inputs(walk, layer, stage, walk.hidden))
        for found, expected in zip(staged.inputs(stage), wanted, strict=True):
            torch.testing.assert_close(found.inputs, expected.inputs)
            torch.testing.assert_close(found.residual, expected.residual)
    staged.finish()
    walk.advance(layer)
    torch.testing.assert_close(stream, walk.hidden)


@pytest.mark.parametrize("method", ["rtn", "imatrix", "awq", "gptq"])
def test_a_checkpoint_that_lies_on_a_grid_keeps_it(tmp_path: Path, method: Method) -> None:
    """All matrices of the trained sample are put on one, with steps of 32 and of 64 weights."""
    folder = tmp_path / "on-grid"
    shutil.copytree(TINY_GEMMA, folder)
    weights = load_file(folder / "model.safetensors")
    for number, (name, weight) in enumerate(weights.items()):
        if weight.dim() == 2:
            blocks = weight.double().numpy().reshape(-1, (32, 64)[number % 2])
            steps = np.float16(np.abs(blocks).max(-1, keepdims=True) / 7).astype(np.float64)
            codes = np.clip(np.round(blocks / steps), -8, 7)
            values = torch.from_numpy((codes * steps).reshape(weight.shape))
            weights[name] = values.to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors")
    bundle = export_checkpoint(
        folder,
        tmp_path / "bundle",
        graphs=["onnxruntime"],
        quantization=QuantizationOptions(
            method=method, calibration_tokens=None if method == "rtn" else 2048
        ),
    )
    stored = load_file(bundle.weights_path)
    for name, weight_format in bundle.manifest.formats.items():
        found = Quantized(unpack(stored[name], weight_format), stored[scales_name(name)])
        error = dequantize(found, weight_format).double() - weights[name].double()
        assert float(error.norm() / weights[name].double().norm()) < 0.002, name

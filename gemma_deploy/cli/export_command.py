"""`gemma-deploy export`: a checkpoint becomes a bundle."""

import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.cli.console import emit_json, notice, progress, say, warn
from gemma_deploy.cli.outputs import announce_new_folders
from gemma_deploy.cli.overflow_table import emit_overflow
from gemma_deploy.cli.quantization_options import parse_quantization, quantization_options

if TYPE_CHECKING:
    from gemma_deploy.bundle import Bundle
    from gemma_deploy.graph_spec import CacheDType, DType, Lowering
    from gemma_deploy.manifest import Manifest
    from gemma_deploy.quantization.choices import Choice


@click.command(
    "export",
    short_help="Turn a Gemma checkpoint into a bundle of ONNX graphs and weights.",
    epilog="""\b
Examples:
  gemma-deploy export ~/models/gemma-2b --output gemma-2b
  gemma-deploy export google/gemma-2b --output gemma-2b --fp16
  gemma-deploy export google/gemma-3-1b-it --revision main --output gemma-3-1b --bf16
  gemma-deploy export ~/models/gemma-2b --output gemma-2b --graphs portable
  gemma-deploy export ~/models/gemma-2b --output gemma-2b --int4
  gemma-deploy export ~/models/gemma-2b --output gemma-2b --int4 --method gptq
  gemma-deploy export ~/models/gemma-2b --output gemma-2b --auto --max-size 2GB

Gemma's activations can grow beyond float16's 65,504. Where anything computes in float16 (--fp16; the
TensorRT graphs of quantized bundles), the model first reads a text in float32, one layer in memory at
a time, and what would overflow is divided by powers of two that the next norm takes out again: exact,
and free at run time. A table of the peaks and divisors is printed, and kept in the bundle. That a
float16 bundle runs on a CPU does not show that nothing overflows on CUDA: ONNX Runtime's CPU
multiplies matrices in float32.

Quantized weights are compared with the original in float32, on a text kept for this (with
--calibration-text: on its end): the mean KL divergence of the next-token distributions. Past 0.05 nats a warning says which options would be closer.

An interrupted calibration (awq and gptq; imatrix after its first minute) continues when the same command
runs again; until then its results are kept in BUNDLE.calibration.

A hub id needs the extra hub (`pip install ".[hub]"` in the clone); HF_TOKEN, HF_HOME and HF_ENDPOINT are honoured.
A folder of that name wins over the hub.
""",
)
@click.argument("checkpoint")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="The folder to create. It appears whole or not at all; folders above it are made.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="What to store the weights in. float32 and float16 compute in the same; bfloat16 computes "
    "in float32, since a CPU has no bfloat16 products, but on TensorRT. With quantized weights: what "
    "to compute in. [default: the checkpoint's own; with quantized weights float32, and float16 on "
    "TensorRT]",
)
@click.option("--fp32", is_flag=True, help="Short for --dtype float32.")
@click.option("--fp16", is_flag=True, help="Short for --dtype float16.")
@click.option("--bf16", is_flag=True, help="Short for --dtype bfloat16.")
@click.option(
    "--cache-dtype",
    type=click.Choice(["float32", "float16", "int8"]),
    help="What the KV cache holds on ONNX Runtime; elsewhere it is what the graphs compute in. int8 is a "
    "quarter of float32 and decodes faster behind a long prompt; its scales are measured on the "
    "calibration text. [default: what the graphs compute in]",
)
@quantization_options
@click.option(
    "--calibration-text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="UTF-8 text to measure activations on, of the kind the model will read; on its end the weights "
    "are compared with the original's. [default: built-in ones]",
)
@click.option(
    "--no-calibration",
    is_flag=True,
    help="Do not run the model: bound float16's peaks by the weights alone, which is quicker and "
    "scales more than it must; round --int4 to nearest, which is further from the original; and leave "
    "unknown how far quantized weights are from it.",
)
@click.option(
    "--graphs",
    type=click.Choice(["onnxruntime", "tensorrt", "portable"]),
    multiple=True,
    help="What to write graphs for, a few KB each over the same weights; repeat it for several. "
    "portable: standard ONNX operators only. onnxruntime is always written. [default: onnxruntime "
    "and, unless the bundle is in float32 or nf4, tensorrt]",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace the bundle at BUNDLE if there is one, its engines too.",
)
@click.option(
    "--revision",
    metavar="REVISION",
    help="Branch, tag or commit of a hub id. [default: its main branch]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with path and sizes.")
def command(
    *,
    checkpoint: str,
    output: Path,
    dtype: "DType | None",
    fp32: bool,
    fp16: bool,
    bf16: bool,
    cache_dtype: "CacheDType | None",
    calibration_text: Path | None,
    no_calibration: bool,
    graphs: "tuple[Lowering, ...]",
    force: bool,
    revision: str | None,
    as_json: bool,
    **quantization: Any,
) -> None:
    """Turn the Gemma checkpoint CHECKPOINT into the bundle BUNDLE.

    CHECKPOINT is a folder in Hugging Face layout (config.json, *.safetensors, tokenizer files) or
    the name of a model on the Hugging Face hub, of which only these files are downloaded. The
    bundle holds ONNX graphs, one weights file, the tokenizer and a manifest; it needs neither the
    checkpoint nor torch to run.
    """
    wanted = _dtype({"float32": fp32, "float16": fp16, "bfloat16": bf16}, dtype)
    options = parse_quantization(quantization)
    from gemma_deploy import api
    from gemma_deploy.engine import ENGINES_FOLDER
    from gemma_deploy.errors import RequestError
    from gemma_deploy.hub import resolve_checkpoint
    from gemma_deploy.manifest import MANIFEST_FILE
    from gemma_deploy.staging import check_replaceable

    if (Path(checkpoint) / MANIFEST_FILE).is_file():
        raise RequestError(
            f"{checkpoint} is a bundle already; export takes a checkpoint. "
            f"Run it: gemma-deploy generate {shlex.quote(checkpoint)} PROMPT"
        )
    # Before a download that may take an hour.
    check_replaceable(output.absolute(), force=force, replaceable=MANIFEST_FILE)
    announce_new_folders(output)
    num_engines = len(list((output / ENGINES_FOLDER).glob("[!.]*/")))
    started = time.perf_counter()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    folder = resolve_checkpoint(checkpoint, revision=revision)
    with progress() as on_progress:
        bundle = api.export(
            folder,
            output,
            dtype=wanted,
            cache_dtype=cache_dtype,
            graphs=graphs or None,
            quantization=options,
            calibration_text=calibration_text,
            is_calibrated=not no_calibration,
            force=force,
            on_progress=on_progress,
        )
    overflow = bundle.overflow_report()
    if overflow is not None:
        emit_overflow(overflow, to_stderr=True)
    choices = bundle.choices()
    if choices:
        _show_choices(choices)
    notice(f"Exported in {time.perf_counter() - started:.1f} s.")
    _warn_of_distance(bundle.manifest, is_calibrated=not no_calibration)
    if num_engines:
        notice(f"The {num_engines} engine(s) of the old bundle went with it; build them again.")
    _report(bundle, as_json=as_json)


def _dtype(flags: Mapping["DType", bool], dtype: "DType | None") -> "DType | None":
    """Return the one dtype that was asked for, or None."""
    wanted: set[DType] = {name for name, is_given in flags.items() if is_given}
    if dtype is not None:
        wanted.add(dtype)
    if len(wanted) > 1:
        raise click.UsageError(
            f"{' and '.join(sorted(wanted))} contradict each other: give one dtype"
        )
    return next(iter(wanted), None)


def _report(bundle: "Bundle", *, as_json: bool) -> None:
    manifest = bundle.manifest
    size_bytes = sum(record.size_bytes for record in manifest.files.values())
    if as_json:
        files = {name: record.size_bytes for name, record in manifest.files.items()}
        found = None if manifest.divergence is None else manifest.divergence.to_dict()
        emit_json(
            {
                "path": str(bundle.folder),
                "size_bytes": size_bytes,
                "files": files,
                "divergence": found,
            }
        )
        return
    path = shlex.quote(str(bundle.folder))
    say(f"{bundle.folder}  {format_bytes(size_bytes)}, weights in {_formats(manifest)}")
    if manifest.divergence is not None:
        say(f"From the original: {manifest.divergence}")
    verb = 'generate {} "Once upon a time"' if manifest.tokenizer else "inspect {}"
    say(f"Next: gemma-deploy {verb.format(path)}")


def _warn_of_distance(manifest: "Manifest", *, is_calibrated: bool) -> None:
    """Say what would be closer to the original if that is far, or why it is not known."""
    from gemma_deploy.quantization.advice import distance_warning

    found = manifest.divergence
    if found is not None:
        warn(distance_warning(manifest, found.mean_kl_nats, is_weights_only=True))
    elif manifest.formats:
        why = "--no-calibration was given"
        if is_calibrated and manifest.method != "bitsandbytes" and manifest.tokenizer:
            why = "the calibration text is too short"
        elif is_calibrated and manifest.tokenizer:
            why = f"the codes are {manifest.method}'s, and what they were made of is not at hand"
        elif is_calibrated:
            why = "there is no tokenizer to read a text with"
        notice(f"How far the weights are from the checkpoint's was not measured: {why}.")


def _formats(manifest: "Manifest") -> str:
    """Return what the weights are stored in: `float16`, `int4/32 by gptq, the rest float16`."""
    quantized = " and ".join(dict.fromkeys(map(str, manifest.formats.values())))
    dense = manifest.precision.weights
    return f"{quantized} by {manifest.method}, the rest {dense}" if quantized else dense


def _show_choices(choices: "Sequence[Choice]") -> None:
    width = max(len(x.name) for x in choices)
    notice("formats chosen by what rounding costs (mean KL divergence in nats)")
    for x in choices:
        size = format_bytes(x.size_bytes)
        notice(f"  {x.name:<{width}}  {x.format!s:<9}  {size:>11}  {x.kl_nats:.2e}")
    total = sum(x.kl_nats for x in choices)
    notice(f"  {'together, rounded to nearest':<{width}}  {'':<9}  {'':>11}  {total:.2e}")

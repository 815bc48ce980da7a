"""Checkpoint folder to bundle folder: `export_checkpoint`."""

import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path

import onnx_ir as ir

from gemma_deploy.bundle import GENERATION_FILE, WEIGHTS_FILE, Bundle
from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint
from gemma_deploy.checkpoint_files import is_licence
from gemma_deploy.engine import ENGINES_FOLDER
from gemma_deploy.errors import (
    BundleError,
    ConfigError,
    ExportError,
    OutputExistsError,
    RequestError,
)
from gemma_deploy.exporters.onnx_graphs import write_graph
from gemma_deploy.exporters.tracing import trace_model
from gemma_deploy.exporters.weights import StoredTensor, plan_weights, write_weights
from gemma_deploy.file_records import FileRecord, record_file
from gemma_deploy.graph_spec import (
    LOWERINGS,
    PHASES,
    DType,
    Lowering,
    Phase,
    Precision,
    graph_name,
)
from gemma_deploy.manifest import MANIFEST_FILE, Manifest
from gemma_deploy.staging import check_replaceable, staged_folder
from gemma_deploy.tokenizer import GemmaTokenizer

OnProgress = Callable[[str, int, int], object]
"""(what is being done, done, total); bytes while writing weights, steps otherwise."""

_PRODUCERS = (
    "gemma-deploy",
    "torch",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
)
_HEAD_DIM_MULTIPLE = 8
# Graphs, tokenizer and manifest together; a 262k-entry tokenizer.json has 33 MB.
_SMALL_FILES_BYTES = 64 << 20


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: DType | None = None,
    graphs: Iterable[Lowering] | None = None,
    force: bool = False,
    on_progress: OnProgress = lambda *_: None,
) -> Bundle:
    """Turn a Gemma checkpoint into a bundle: ONNX graphs of each phase over one weights file.

    The bundle appears whole or not at all. Memory stays flat whatever the model's size: the graphs
    are traced without weights, and weights are streamed.

    Args:
        checkpoint: Folder in Hugging Face layout (config.json, *.safetensors, tokenizer files).
        output: The bundle folder to create.
        dtype: What to store the weights in; None keeps the checkpoint's own. float32 and float16
            graphs compute in that dtype, bfloat16 graphs in float32 (those for TensorRT in
            bfloat16); norms and logits are float32.
        graphs: Lowerings to write graphs of; those for ONNX Runtime are always written. None adds
            those for TensorRT, unless the bundle is in float32, which no engine computes in.
        force: Whether an existing bundle at `output` may be replaced.
        on_progress: Called as the work goes on.

    Raises:
        RequestError: TensorRT graphs of a float32 bundle.
        CheckpointError: Weights missing, truncated, of the wrong shape or dtype, or not finite.
        ConfigError: Another model family, bidirectional attention (an encoder), or a head_dim that
            ONNX Runtime's attention does not take.
        TokenizerError: The tokenizer's files cannot be read.
        OutputExistsError: `output` exists and `force` is False, or holds more than a bundle.
        ExportError: The disk is too small, `output` cannot be written, or torch failed.
    """
    check_replaceable(output.absolute(), force=force, replaceable=MANIFEST_FILE)
    _check_nothing_else_is_replaced(checkpoint, output)
    source = Checkpoint.open(checkpoint)
    _check_config(source)
    if GemmaTokenizer.files(checkpoint):
        # A bundle whose tokenizer cannot be read would be of no use.
        GemmaTokenizer.from_pretrained(checkpoint)
    precision = Precision.of(dtype or _own_dtype(source))
    lowerings = _lowerings(graphs, precision)
    plan = plan_weights(source, precision)
    with staged_folder(output, force=force, replaceable=MANIFEST_FILE) as folder:
        _require_space(folder, sum(tensor.size_bytes for tensor in plan), output)
        weights, record = _write_weights(source, plan, folder, on_progress)
        written = _write_graphs(source, precision, lowerings, weights, folder, on_progress)
        on_progress("finishing", len(PHASES), len(PHASES))
        _write_manifest(source, precision, written, folder, {WEIGHTS_FILE: record})
    return Bundle.open(output)


def _lowerings(graphs: Iterable[Lowering] | None, precision: Precision) -> tuple[Lowering, ...]:
    """Return the lowerings to write, in the order of `LOWERINGS`."""
    is_float32 = precision.weights == "float32"
    if graphs is None:
        wanted: set[Lowering] = set() if is_float32 else {"tensorrt"}
    else:
        wanted = set(graphs)
        if is_float32 and "tensorrt" in wanted:
            raise RequestError(
                "TensorRT graphs of a float32 bundle were asked for; engines compute in float16 or "
                "bfloat16: export with --fp16 or --bf16, or without --graphs tensorrt"
            )
    return tuple(lowering for lowering in LOWERINGS if lowering in wanted | {"onnxruntime"})


def _write_graphs(
    source: Checkpoint,
    precision: Precision,
    lowerings: tuple[Lowering, ...],
    weights: Mapping[str, tuple[StoredTensor, int]],
    folder: Path,
    on_progress: OnProgress,
) -> dict[Lowering, dict[Phase, str]]:
    """Write every graph; return the files' names. Graphs that compute alike share a trace."""
    files: dict[Lowering, dict[Phase, str]] = {lowering: {} for lowering in lowerings}
    for step, phase in enumerate(PHASES):
        on_progress(f"tracing the {phase} graph", step, len(PHASES))
        traced: dict[DType, ir.Model] = {}
        for lowering in lowerings:
            dtype = precision.of_lowering(lowering).activations
            if dtype not in traced:
                traced[dtype] = trace_model(source.config, phase, dtype)
            name = f"{graph_name(phase, lowering)}.onnx"
            write_graph(traced[dtype], lowering, dtype, source.config, weights, folder / name)
            files[lowering][phase] = name
    return files


def _check_nothing_else_is_replaced(checkpoint: Path, output: Path) -> None:
    """Refuse to replace a bundle together with what else lies in its folder."""
    if not output.is_dir():
        return
    if checkpoint.resolve().is_relative_to(output.resolve()):
        raise OutputExistsError(
            f"{output} holds the checkpoint {checkpoint}, which would be replaced with it: choose "
            "another output"
        )
    if not any(output.iterdir()):
        return
    try:
        # Engines are made from a bundle's graphs, and go with it.
        known = {MANIFEST_FILE, ENGINES_FOLDER, *Bundle.open(output).manifest.files}
    except BundleError:
        return  # damaged, and to be replaced: what belongs to it cannot be told
    others = sorted(path.name for path in output.iterdir() if path.name not in known)
    if others:
        raise OutputExistsError(
            f"{output} holds {others[0]}, which is not of the bundle that would be replaced: move "
            "it away, or choose another output"
        )


def _check_config(source: Checkpoint) -> None:
    config = source.config
    if config.use_bidirectional_attention:
        raise ConfigError(
            f"{source.folder} attends in both directions (use_bidirectional_attention): an encoder, "
            "which cannot generate text. Only causal models are exported"
        )
    if config.head_dim % _HEAD_DIM_MULTIPLE:
        raise ConfigError(
            f"head_dim is {config.head_dim}; ONNX Runtime's attention operator takes multiples of "
            f"{_HEAD_DIM_MULTIPLE}: run this model with --backend torch"
        )


def _own_dtype(source: Checkpoint) -> DType:
    """Return what most of the checkpoint's bytes are stored in."""
    sizes: dict[str, int] = {}
    for info in source.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.size_bytes
    return DTYPE_NAMES[max(sizes, key=lambda name: sizes[name])]


def _require_space(folder: Path, weights_bytes: int, output: Path) -> None:
    needed, free = weights_bytes + _SMALL_FILES_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"{output.parent} has {free / 1e9:.1f} GB free, the bundle needs {needed / 1e9:.1f} GB: "
            "free space, choose another output, or a narrower --dtype. Nothing was written"
        )


def _write_weights(
    source: Checkpoint, plan: tuple[StoredTensor, ...], folder: Path, on_progress: OnProgress
) -> tuple[dict[str, tuple[StoredTensor, int]], FileRecord]:
    total, done = sum(tensor.size_bytes for tensor in plan), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done = min(total, done + count)
        on_progress("writing weights", done, total)

    written = write_weights(source, plan, folder / WEIGHTS_FILE, on_bytes)
    weights = {tensor.name: (tensor, written.offsets[tensor.name]) for tensor in plan}
    return weights, written.record


def _write_manifest(
    source: Checkpoint,
    precision: Precision,
    graphs: Mapping[Lowering, Mapping[Phase, str]],
    folder: Path,
    records: dict[str, FileRecord],
) -> None:
    """Copy the small files, measure everything, and write the manifest last."""
    tokenizer = [_copied(path, folder) for path in GemmaTokenizer.files(source.folder)]
    generation = source.folder / GENERATION_FILE
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and is_licence(path.name):
            _copied(path, folder)
    manifest = Manifest(
        config=source.config,
        precision=precision,
        graphs=graphs,
        weights=WEIGHTS_FILE,
        tokenizer=tuple(tokenizer),
        generation=_copied(generation, folder) if generation.is_file() else None,
        max_seq_len=source.config.max_position_embeddings,
        files=records
        | {
            path.name: record_file(path)
            for path in sorted(folder.iterdir())
            if path.name not in records
        },
        versions=_versions(),
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def _copied(path: Path, folder: Path) -> str:
    shutil.copyfile(path, folder / path.name)
    return path.name


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PRODUCERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # one of the two onnxruntime packages is enough
    return versions

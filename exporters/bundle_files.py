"""The files of a bundle, written as planned: `write_bundle`."""

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from gemma_deploy.bundle import GENERATION_FILE, WEIGHTS_FILE
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_files import is_licence
from gemma_deploy.checkpoint_source import CheckpointSource
from gemma_deploy.errors import BundleError, ExportError
from gemma_deploy.exporters.calibration.divergence import measure_divergence
from gemma_deploy.exporters.compact_tokenizer import compact_tokenizer
from gemma_deploy.exporters.onnx_graphs import write_graph
from gemma_deploy.exporters.tracing import trace_model
from gemma_deploy.exporters.weights import StoredTensor, write_weights
from gemma_deploy.file_records import FileRecord, record_file
from gemma_deploy.graph_checks import check_graph
from gemma_deploy.graph_spec import PHASES, DType, Lowering, Phase, Precision, graph_name
from gemma_deploy.manifest import MANIFEST_FILE, Manifest
from gemma_deploy.model.bundle_weights import BundleWeights
from gemma_deploy.overflow_report import OVERFLOW_FILE, OverflowReport
from gemma_deploy.quantization.choices import CHOICES_FILE, Choice, choices_json
from gemma_deploy.quantization.divergence import Divergence
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.residual_scaling import ResidualScaling
from gemma_deploy.tokenizer import TOKENIZER_FILE, GemmaTokenizer

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


@dataclass(frozen=True, slots=True, kw_only=True)
class BundlePlan:
    """All that is decided of a bundle before it is written.

    Attributes:
        source: The checkpoint.
        precision: Dtypes of what is not quantized.
        lowerings: What graphs are written for.
        tensors: What the weights file holds.
        prepared: What calibration has made, by name (`write_weights`).
        importance: What scales of matrices are searched by, by name (`write_weights`).
        method: What found the codes of quantized matrices; None without any.
        scaling: What weights are divided by; None for nothing.
        overflow: Why; None where nothing computes in float16.
        choices: What formats were chosen by sensitivity; empty where they were given.
        measured_rows: What the written weights are compared with the checkpoint on, int64 [R, S];
            None for no comparison.
    """

    source: Checkpoint
    precision: Precision
    lowerings: tuple[Lowering, ...]
    tensors: tuple[StoredTensor, ...]
    prepared: Mapping[str, Path | Tensor]
    method: str | None
    scaling: ResidualScaling | None
    overflow: OverflowReport | None
    choices: tuple[Choice, ...] = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    measured_rows: Tensor | None = None

    @property
    def formats(self) -> dict[str, WeightFormat]:
        """How quantized matrices are stored, by name."""
        return {x.name: x.format for x in self.tensors if x.format.is_quantized}

    @property
    def weights_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)


def write_bundle(plan: BundlePlan, folder: Path, on_progress: OnProgress) -> None:
    """Write every file of a bundle, the manifest last.

    Args:
        plan: What to write.
        folder: Where; what lies there already becomes part of the bundle.
        on_progress: Called as the work goes on.

    Raises:
        CheckpointError: A weight is not finite, or the checkpoint cannot be read.
        ExportError: A weight is too large for its dtype, what was written gives no numbers, or torch
            failed.
    """
    weights, record = _write_weights(plan, folder, on_progress)
    divergence = _measured(plan, folder, on_progress)
    graphs = _write_graphs(plan, weights, folder, on_progress)
    on_progress("finishing", len(PHASES), len(PHASES))
    if plan.overflow is not None:
        report = json.dumps(plan.overflow.to_dict(), indent=1)
        (folder / OVERFLOW_FILE).write_text(report + "\n", encoding="utf-8")
    if plan.choices:
        (folder / CHOICES_FILE).write_text(choices_json(plan.choices), encoding="utf-8")
    _write_manifest(plan, graphs, divergence, folder, {WEIGHTS_FILE: record})


def _write_weights(
    plan: BundlePlan, folder: Path, on_progress: OnProgress
) -> tuple[dict[str, tuple[StoredTensor, int]], FileRecord]:
    total, done = plan.weights_bytes, 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done = min(total, done + count)
        on_progress("writing weights", done, total)

    written = write_weights(
        plan.source, plan.tensors, folder / WEIGHTS_FILE, on_bytes, plan.prepared, plan.importance
    )
    weights = {tensor.name: (tensor, written.offsets[tensor.name]) for tensor in plan.tensors}
    return weights, written.record


def _measured(plan: BundlePlan, folder: Path, on_progress: OnProgress) -> Divergence | None:
    """Compare what was written with the checkpoint, if that is planned."""
    if plan.measured_rows is None:
        return None
    weights = BundleWeights(folder / WEIGHTS_FILE, plan.formats, plan.scaling)
    return measure_divergence(plan.source, weights, plan.measured_rows, on_progress)


def _write_graphs(
    plan: BundlePlan,
    weights: Mapping[str, tuple[StoredTensor, int]],
    folder: Path,
    on_progress: OnProgress,
) -> dict[Lowering, dict[Phase, str]]:
    """Write every graph; return the files' names. Graphs that compute alike share a trace."""
    config = plan.source.config
    files: dict[Lowering, dict[Phase, str]] = {lowering: {} for lowering in plan.lowerings}
    for step, phase in enumerate(PHASES):
        on_progress(f"tracing the {phase} graph", step, len(PHASES))
        traced: dict[DType, ir.Model] = {}
        for lowering in plan.lowerings:
            precision = plan.precision.of_lowering(lowering)
            dtype = precision.activations
            if dtype not in traced:
                traced[dtype] = trace_model(config, phase, dtype, plan.scaling)
            name = f"{graph_name(phase, lowering)}.onnx"
            write_graph(traced[dtype], lowering, precision, config, weights, folder / name)
            _check_written(folder / name)
            files[lowering][phase] = name
    return files


def _check_written(graph: Path) -> None:
    """Refuse to write what could not be loaded: another torch may trace other operators.

    Raises:
        ExportError: The graph holds what `check_graph` does not know.
    """
    try:
        check_graph(graph.parent, graph, WEIGHTS_FILE)
    except BundleError as err:
        raise ExportError(
            f"torch {metadata.version('torch')} made a graph that gemma-deploy does not know "
            f"({err}): install the version of torch that it is tested with (README)"
        ) from err


def _write_manifest(
    plan: BundlePlan,
    graphs: Mapping[Lowering, Mapping[Phase, str]],
    divergence: Divergence | None,
    folder: Path,
    records: dict[str, FileRecord],
) -> None:
    """Copy the small files, measure everything, and write the manifest last."""
    source = plan.source
    tokenizer = [_copied_tokenizer(path, folder) for path in GemmaTokenizer.files(source.folder)]
    generation = source.folder / GENERATION_FILE
    for path in sorted(source.folder.iterdir()):
        if path.is_file() and is_licence(path.name):
            _copied(path, folder)
    manifest = Manifest(
        config=source.config,
        precision=plan.precision,
        graphs=graphs,
        weights=WEIGHTS_FILE,
        formats=plan.formats,
        method=plan.method,
        divergence=divergence,
        scaling=plan.scaling,
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
        source=CheckpointSource.of(source.folder),
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def _copied(path: Path, folder: Path) -> str:
    shutil.copyfile(path, folder / path.name)
    return path.name


def _copied_tokenizer(path: Path, folder: Path) -> str:
    if path.name != TOKENIZER_FILE:
        return _copied(path, folder)
    compact = compact_tokenizer(path.read_text(encoding="utf-8"))
    if compact is None:
        return _copied(path, folder)
    (folder / path.name).write_bytes(compact.encode())
    return path.name


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PRODUCERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # one of the two onnxruntime packages is enough
    return versions

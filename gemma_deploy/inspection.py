"""What a bundle, a checkpoint or an engine holds: model, files, dtypes, sizes, memory it needs."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from gemma_deploy import memory
from gemma_deploy.bundle import Bundle
from gemma_deploy.checkpoint import DTYPE_NAMES, Checkpoint, expected_tensors
from gemma_deploy.checkpoint_files import explain_folder
from gemma_deploy.config import GemmaConfig
from gemma_deploy.engine import ENGINE_FILE, EngineFolder, engines_of
from gemma_deploy.errors import BundleError, RequestError
from gemma_deploy.graph_spec import DType, Precision
from gemma_deploy.manifest import MANIFEST_FILE, Manifest
from gemma_deploy.quantization.formats import STORED_BYTES, WeightFormat, scales_name
from gemma_deploy.tokenizer.settings import TOKENIZER_FILE


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The contents of a bundle or a checkpoint.

    Attributes:
        kind: What the folder is.
        folder: The folder.
        config: The model.
        precision: Dtypes of a bundle; for a checkpoint, those of the bundle that `export` makes of
            it unless told otherwise.
        parameters: Number of weights; a tied embedding counts once.
        weights_bytes: Size of the weights as stored, scales included.
        bytes_by_group: That size per group of tensors (`memory.GROUPS`).
        bits_by_group: Bits per weight of each group, scales included.
        bytes_by_dtype: That size per dtype, or per format of quantized matrices.
        matrices_by_format: How many matrices are quantized, per format.
        files: Size in bytes of each file.
        manifest: All that a bundle says of itself; None for a checkpoint.
        engines: Engines kept in a bundle, the latest built first.
        damaged_engines: What is wrong with those that cannot be opened, by the name of their folder.
    """

    kind: Literal["bundle", "checkpoint"]
    folder: Path
    config: GemmaConfig
    precision: Precision
    parameters: int
    weights_bytes: int
    bytes_by_group: Mapping[str, int]
    bits_by_group: Mapping[str, float]
    bytes_by_dtype: Mapping[str, int]
    files: Mapping[str, int]
    manifest: Manifest | None
    matrices_by_format: Mapping[str, int] = field(default_factory=dict)
    engines: tuple[EngineFolder, ...] = ()
    damaged_engines: Mapping[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes on average: of all tensors, scales included."""
        return 8 * self.weights_bytes / self.parameters

    @property
    def max_seq_len(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        if self.manifest is not None:
            return self.manifest.max_seq_len
        return self.config.max_position_embeddings

    def estimate(
        self, *, batch_size: int, max_seq_len: int, prefill_tokens: int
    ) -> memory.MemoryEstimate:
        """Estimate what running it takes; for a checkpoint, the bundle that would be made of it.

        Args:
            batch_size: Prompts at a time.
            max_seq_len: Tokens of prompt and answer together.
            prefill_tokens: Longest piece of a prompt that is computed at once.

        Raises:
            RequestError: `max_seq_len` is beyond what the model was made for.
        """
        if max_seq_len > self.max_seq_len:
            raise RequestError(
                f"max_seq_len is {max_seq_len}; the model was made for at most "
                f"{self.max_seq_len} tokens"
            )
        is_bundle = self.kind == "bundle"
        stored = self.weights_bytes if is_bundle else self._bundle_bytes(self.precision)
        return memory.estimate(
            self.config,
            self.precision,
            {} if self.manifest is None else self.manifest.formats,
            stored_bytes=stored,
            tokenizer_file_bytes=self.files.get(TOKENIZER_FILE, 0),
            batch_size=batch_size,
            max_seq_len=max_seq_len,
            prefill_tokens=prefill_tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "kind": self.kind,
            "path": str(self.folder),
            "model": self.config.to_dict(),
            "precision": dataclasses.asdict(self.precision),
            "parameters": self.parameters,
            "weights": {
                "size_bytes": self.weights_bytes,
                "bits_per_weight": self.bits_per_weight,
                "by_group": dict(self.bytes_by_group),
                "bits_by_group": dict(self.bits_by_group),
                "by_dtype": dict(self.bytes_by_dtype),
                "matrices_by_format": dict(self.matrices_by_format),
            },
            "files": dict(self.files),
            "manifest": None if self.manifest is None else json.loads(self.manifest.to_json()),
            "engines": [_engine_summary(engine) for engine in self.engines],
            "damaged_engines": dict(self.damaged_engines),
        }

    def _bundle_bytes(self, precision: Precision) -> int:
        return memory.weights_bytes(self.config, precision)


def inspect_folder(folder: Path) -> Inspection:
    """Read what a bundle or a checkpoint holds; no weights are read (for engines: `EngineFolder.open`).

    Raises:
        RequestError: Neither of the two is at `folder`.
        BundleError: A bundle that is incomplete.
        CheckpointError: A checkpoint that is incomplete.
        ConfigError: A checkpoint of another model family.
    """
    if (folder / MANIFEST_FILE).is_file():
        return _inspect_bundle(Bundle.open(folder))
    wrong = explain_folder(folder)
    if wrong is not None:
        raise RequestError(
            f"{wrong}. A bundle ({MANIFEST_FILE}) or an engine ({ENGINE_FILE}) would do, too"
        )
    return _inspect_checkpoint(Checkpoint.open(folder))


def plan_sizes(engine: EngineFolder) -> dict[str, int]:
    """Return the size in bytes of each plan of an engine; one file may serve both phases."""
    manifest = engine.manifest
    return {plan.path: manifest.files[plan.path].size_bytes for plan in manifest.plans.values()}


def engine_report(engine: EngineFolder) -> dict[str, Any]:
    """Return everything about an engine as JSON can hold it; compare `Inspection.to_dict`."""
    files = {name: record.size_bytes for name, record in engine.manifest.files.items()}
    return {
        "kind": "engine",
        "path": str(engine.folder),
        "model": engine.manifest.model.to_dict(),
        "plans": plan_sizes(engine),
        "files": files | {ENGINE_FILE: (engine.folder / ENGINE_FILE).stat().st_size},
        "manifest": json.loads(engine.manifest.to_json()),
    }


def _engine_summary(engine: EngineFolder) -> dict[str, Any]:
    return {
        "name": engine.folder.name,
        "size_bytes": sum(plan_sizes(engine).values()),
        "build": engine.manifest.build.to_dict(),
    }


def _inspect_bundle(bundle: Bundle) -> Inspection:
    engines, damaged = engines_of(bundle)
    manifest = bundle.manifest
    manifest_bytes = (bundle.folder / MANIFEST_FILE).stat().st_size
    tensors = _stored_tensors(bundle.weights_path, manifest.formats)
    by_group = memory.sums_by_group((name, size) for name, _, size in tensors)
    return Inspection(
        kind="bundle",
        folder=bundle.folder,
        config=bundle.config,
        precision=manifest.precision,
        parameters=memory.num_parameters(bundle.config),
        weights_bytes=sum(by_group.values()),
        bytes_by_group=by_group,
        bits_by_group=_bits_by_group(bundle.config, by_group),
        bytes_by_dtype=_bytes_by_dtype([(dtype, size) for _, dtype, size in tensors]),
        matrices_by_format=dict(Counter(map(str, manifest.formats.values())).most_common()),
        files={name: record.size_bytes for name, record in manifest.files.items()}
        | {MANIFEST_FILE: manifest_bytes},
        manifest=manifest,
        engines=tuple(engines),
        damaged_engines={name: str(err) for name, err in damaged.items()},
    )


def _inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    tensors = checkpoint.tensors.values()
    by_dtype = _bytes_by_dtype([(DTYPE_NAMES[t.dtype], t.size_bytes) for t in tensors])
    own_dtype = cast(DType, next(iter(by_dtype)))
    by_group = memory.sums_by_group((t.name, t.size_bytes) for t in tensors)
    paths = sorted(path for path in checkpoint.folder.iterdir() if path.is_file())
    return Inspection(
        kind="checkpoint",
        folder=checkpoint.folder,
        config=checkpoint.config,
        precision=Precision.of(own_dtype),
        parameters=memory.num_parameters(checkpoint.config),
        weights_bytes=sum(by_group.values()),
        bytes_by_group=by_group,
        bits_by_group=_bits_by_group(checkpoint.config, by_group),
        bytes_by_dtype=by_dtype,
        files={path.name: path.stat().st_size for path in paths},
        manifest=None,
    )


def _stored_tensors(path: Path, formats: Mapping[str, WeightFormat]) -> list[tuple[str, str, int]]:
    """Return (name, dtype or format, bytes) of each tensor of a weights file."""
    from safetensors import SafetensorError, safe_open

    format_of = {
        part: str(weight_format)
        for name, weight_format in formats.items()
        for part in (name, scales_name(name))
    }
    tensors = []
    path.open("rb").close()  # safetensors calls a file that may not be read one that is not there
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                dtype = part.get_dtype()
                size_bytes = math.prod(part.get_shape()) * STORED_BYTES[dtype]
                tensors.append((name, format_of.get(name) or DTYPE_NAMES[dtype], size_bytes))
    except (SafetensorError, KeyError) as err:
        raise BundleError(
            f"{path} cannot be read as safetensors ({err}): copy the bundle again or export it again"
        ) from err
    return tensors


def _bytes_by_dtype(sizes: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Sum bytes per dtype, the largest sum first."""
    sums: dict[str, int] = {}
    for dtype, size in sizes:
        sums[dtype] = sums.get(dtype, 0) + size
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _bits_by_group(config: GemmaConfig, bytes_by_group: Mapping[str, int]) -> dict[str, float]:
    counts = memory.sums_by_group(
        (name, math.prod(shape)) for name, shape in expected_tensors(config).items()
    )
    return {
        group: 8 * size / counts[group] for group, size in bytes_by_group.items() if group in counts
    }

"""The bundle: a folder of graphs, weights, tokenizer, and the manifest that describes them."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast, get_args

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import BundleError, BundleVersionError, ConfigError
from gemma_deploy.file_records import FileRecord, changed_files, wrong_file
from gemma_deploy.graph_spec import (
    LOWERINGS,
    PHASES,
    DType,
    GraphSpec,
    Lowering,
    Phase,
    Precision,
    graph_name,
    graph_spec,
)

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"
GENERATION_FILE = "generation_config.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of `manifest.json`; docs/bundle.md describes the file.

    Attributes:
        config: The model.
        precision: Dtypes of weights, activations and cache.
        graphs: Path of each phase's graph, for each lowering the bundle has; `onnxruntime` always.
        weights: Path of the weights file all graphs point into.
        tokenizer: Paths of the tokenizer's files.
        generation: Path of generation_config.json, or None.
        max_seq_len: Longest sequence the model was made for, in tokens.
        files: Size and hash of every file but the manifest itself.
        versions: Versions of everything that made the bundle.
    """

    config: GemmaConfig
    precision: Precision
    graphs: Mapping[Lowering, Mapping[Phase, str]]
    weights: str
    tokenizer: tuple[str, ...]
    generation: str | None
    max_seq_len: int
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]

    @property
    def lowerings(self) -> tuple[Lowering, ...]:
        """The lowerings the bundle has graphs of, in the order of `LOWERINGS`."""
        return tuple(lowering for lowering in LOWERINGS if lowering in self.graphs)

    def precision_of(self, lowering: Lowering) -> Precision:
        """Return the dtypes of a lowering's graphs.

        Raises:
            BundleError: The bundle has no such graphs.
        """
        self._require(lowering)
        return self.precision.of_lowering(lowering)

    def spec(self, phase: Phase, lowering: Lowering = "onnxruntime") -> GraphSpec:
        """Return what the graph of a phase takes and gives.

        Raises:
            BundleError: The bundle has no graphs of that lowering.
        """
        return graph_spec(self.config, phase, self.precision_of(lowering).cache)

    def graph_file(self, phase: Phase, lowering: Lowering = "onnxruntime") -> str:
        """Return the path of a phase's graph, within the bundle.

        Raises:
            BundleError: The bundle has no graphs of that lowering.
        """
        self._require(lowering)
        return self.graphs[lowering][phase]

    def _require(self, lowering: Lowering) -> None:
        if lowering in self.graphs:
            return
        if lowering == "tensorrt" and self.precision.weights == "float32":
            raise BundleError(
                "the bundle is in float32 and has no tensorrt graphs: TensorRT engines compute in "
                "float16 or bfloat16. Export it again: `gemma-deploy export CHECKPOINT --output BUNDLE "
                "--force --fp16` (or --bf16)"
            )
        # A bundle is replaced as a whole: what it has besides is asked for again.
        wanted = [x for x in LOWERINGS if x == lowering or x in self.graphs]
        options = " ".join(f"--graphs {x}" for x in wanted if x != "onnxruntime")
        raise BundleError(
            f"the bundle has no {lowering} graphs, only {', '.join(self.lowerings)}. Export it again: "
            f"`gemma-deploy export CHECKPOINT --output BUNDLE --force --dtype "
            f"{self.precision.weights} {options}`"
        )

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        body = {
            "format_version": FORMAT_VERSION,
            "model": self.config.to_dict(),
            "precision": dataclasses.asdict(self.precision),
            "graphs": {
                graph_name(phase, lowering): {
                    "path": self.graphs[lowering][phase],
                    **_spec_json(self.spec(phase, lowering)),
                }
                for lowering in self.lowerings
                for phase in PHASES
            },
            "weights": self.weights,
            "tokenizer": list(self.tokenizer),
            "generation": self.generation,
            "limits": {"max_seq_len": self.max_seq_len},
            "files": {path: dataclasses.asdict(record) for path, record in self.files.items()},
            "versions": dict(self.versions),
        }
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle on disk, its manifest read and its file sizes checked."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> "Bundle":
        """Read the manifest; check the version, the paths, the sizes and the graph specs.

        Hashes are not computed here (see `changed_files`).

        Raises:
            BundleError: No manifest, a broken one, a missing file or one of another size, or a
                tokenizer file that the manifest does not list.
            BundleVersionError: A format this version does not know.
            UnsafePathError: A path that leaves the folder.
        """
        manifest = _parse_manifest(_read_manifest(folder))
        wrong = wrong_file(folder, manifest.files, MANIFEST_FILE, called="the manifest")
        if wrong is not None:
            raise BundleError(
                f"{wrong}: the bundle is incomplete or was changed; copy it again or export it again"
            )
        for name in _referenced(manifest):
            if name not in manifest.files:
                raise BundleError(
                    f"{folder / MANIFEST_FILE} refers to {name!r}, which is not among its files: "
                    "export the bundle again"
                )
        _refuse_unlisted_tokenizer_files(folder, manifest)
        return cls(folder=folder, manifest=manifest)

    @property
    def config(self) -> GemmaConfig:
        """The model."""
        return self.manifest.config

    def graph_path(self, phase: Phase, lowering: Lowering = "onnxruntime") -> Path:
        """Return the path of a phase's ONNX graph.

        Raises:
            BundleError: The bundle has no graphs of that lowering.
        """
        return self.folder / self.manifest.graph_file(phase, lowering)

    @property
    def weights_path(self) -> Path:
        """The weights file all graphs point into."""
        return self.folder / self.manifest.weights

    def generation_config(self) -> dict[str, Any]:
        """Return the parsed generation_config.json; empty when the checkpoint had none.

        Raises:
            BundleError: The file is not a JSON object.
        """
        if self.manifest.generation is None:
            return {}
        return _json_object(self.folder / self.manifest.generation)

    def changed_files(self, on_bytes: Callable[[int], object] = lambda _: None) -> list[str]:
        """Hash every file and return the paths whose SHA-256 is not the manifest's.

        Args:
            on_bytes: Called with the number of bytes hashed since the last call, for progress.
        """
        return changed_files(self.folder, self.manifest.files, on_bytes)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise BundleError(f"{path} cannot be read as JSON: {err}") from err
    if not isinstance(raw, dict):
        raise BundleError(f"{path} holds {type(raw).__name__}, expected a JSON object")
    return raw


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if not folder.exists():
        raise BundleError(f"{folder} does not exist; expected the folder of a bundle")
    if not path.is_file():
        hint = ""
        if (folder / "engine.json").is_file():
            hint = "; it is an engine: give the bundle that it was built from"
        if (folder / "config.json").is_file():
            hint = "; this looks like a checkpoint: run `gemma-deploy export` on it first"
        raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST_FILE}{hint}")
    raw = _json_object(path)
    version = raw.get("format_version")
    if not _is_positive_int(version):
        raise BundleError(
            f"{path} has format_version {version!r}, expected a whole number from 1: not a "
            "gemma-deploy manifest; export the bundle again"
        )
    if version > FORMAT_VERSION:
        raise BundleVersionError(
            f"{folder} has bundle format {version}, this gemma-deploy reads up to "
            f"{FORMAT_VERSION}: upgrade with `pip install --upgrade gemma-deploy`"
        )
    return raw


def _parse_manifest(raw: Mapping[str, Any]) -> Manifest:
    try:
        precision = Precision(**raw["precision"])
        for dtype in dataclasses.astuple(precision):
            if dtype not in get_args(DType):
                raise BundleError(f"manifest.json: unknown dtype {dtype!r} in precision")
        config = GemmaConfig.from_dict(raw["model"])
        manifest = Manifest(
            config=config,
            precision=precision,
            graphs=_parse_graphs(raw["graphs"]),
            weights=str(raw["weights"]),
            tokenizer=tuple(map(str, raw["tokenizer"])),
            generation=None if raw["generation"] is None else str(raw["generation"]),
            max_seq_len=_max_seq_len(raw["limits"]["max_seq_len"], config),
            files={
                path: FileRecord(size_bytes=int(record["size_bytes"]), sha256=record["sha256"])
                for path, record in raw["files"].items()
            },
            versions=dict(raw["versions"]),
        )
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError, ConfigError) as err:
        raise BundleError(
            f"manifest.json is damaged ({type(err).__name__}: {err}): export the bundle again"
        ) from err
    for lowering in manifest.lowerings:
        for phase in PHASES:
            name = graph_name(phase, lowering)
            stated = {key: raw["graphs"][name].get(key) for key in ("inputs", "outputs")}
            if stated != _spec_json(manifest.spec(phase, lowering)):
                raise BundleError(
                    f"manifest.json: the inputs and outputs of the {name} graph are not those of the "
                    "model it describes: export the bundle again"
                )
    return manifest


def _parse_graphs(raw: Mapping[str, Any]) -> dict[Lowering, dict[Phase, str]]:
    """Return the paths of the graphs; a lowering is there with all its phases or not at all."""
    return {
        lowering: {phase: str(raw[graph_name(phase, lowering)]["path"]) for phase in PHASES}
        for lowering in LOWERINGS
        if lowering == "onnxruntime" or any(graph_name(phase, lowering) in raw for phase in PHASES)
    }


def _max_seq_len(value: object, config: GemmaConfig) -> int:
    limit = config.max_position_embeddings
    if not _is_positive_int(value) or value > limit:
        raise ValueError(f"max_seq_len is {value!r}, expected a whole number from 1 to {limit}")
    return value


def _is_positive_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _refuse_unlisted_tokenizer_files(folder: Path, manifest: Manifest) -> None:
    """Refuse what the tokenizer would read though no size, hash or path check covers it."""
    from gemma_deploy.tokenizer import GemmaTokenizer

    for path in GemmaTokenizer.files(folder):
        if path.name not in manifest.files:
            raise BundleError(
                f"{path} is a tokenizer file that {MANIFEST_FILE} does not list: it was not part of "
                "the export; remove it, or export the bundle again with it in the checkpoint"
            )


def _referenced(manifest: Manifest) -> list[str]:
    generation = [manifest.generation] if manifest.generation else []
    graphs = [path for by_phase in manifest.graphs.values() for path in by_phase.values()]
    return [*graphs, manifest.weights, *manifest.tokenizer, *generation]


def _spec_json(spec: GraphSpec) -> dict[str, Any]:
    body = dataclasses.asdict(spec)
    del body["phase"]
    return cast(dict[str, Any], json.loads(json.dumps(body)))

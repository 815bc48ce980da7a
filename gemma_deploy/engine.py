"""The engine folder: TensorRT plans, and the manifest that says what they are and where they run."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from gemma_deploy.bundle import Bundle
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import (
    BundleVersionError,
    ConfigError,
    EngineError,
    GemmaDeployError,
    UnsafePathError,
)
from gemma_deploy.file_records import FileRecord, sha256_of
from gemma_deploy.graph_spec import (
    PHASES,
    DType,
    GraphSpec,
    Phase,
    TensorSpec,
    graph_spec,
)
from gemma_deploy.safe_paths import safe_path
from gemma_deploy.tensorrt.library import Flavour

ENGINE_FILE = "engine.json"
ENGINES_FOLDER = "engines"
FORMAT_VERSION = 1

TOP_LOGITS = "top_logits"
TOP_INDICES = "top_indices"
LOGITS_SUM = "logits_sum"

Layout = Literal["one-engine", "two-engines"]
Attention = Literal["auto", "native", "plugin"]

_KEY_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What an engine was built for; larger requests are refused before anything runs.

    Attributes:
        max_batch_size: Most rows of a step.
        max_seq_len: Tokens of a row's KV cache: exactly these, an engine's cache has a fixed length.
        max_step_tokens: Most tokens of a row in one prefill step.
        max_logits: Most positions of a row whose logits are asked for in one prefill step.
        num_candidates: Largest logits the engine picks out itself, the k of `top_logits`.
    """

    max_batch_size: int
    max_seq_len: int
    max_step_tokens: int
    max_logits: int
    num_candidates: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuild:
    """Everything that decides what plans come out of a bundle's graphs.

    Attributes:
        flavour: The library.
        library_version: Its version; no other version loads the plans.
        targets: Compute capabilities such as `8.9`, ascending: the GPUs the plans run on.
        layout: `one-engine` with a profile for each phase, or `two-engines` with the weights in both.
        attention: As asked for: `native` kernels, the `plugin`, or `auto`.
        plugin_version: Of the attention plugin; None if no layer uses it.
        limits: Sizes of the optimization profiles.
        graphs: SHA-256 of each phase's graph file.
        weights: SHA-256 of the weights file.
    """

    flavour: Flavour
    library_version: str
    targets: tuple[str, ...]
    layout: Layout
    attention: Attention
    plugin_version: str | None
    limits: EngineLimits
    graphs: Mapping[Phase, str]
    weights: str

    @property
    def key(self) -> str:
        """Return the name of the engine's folder: readable, and another for any other build."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]
        targets = "+".join(f"sm{target.replace('.', '')}" for target in self.targets)
        return f"{self.flavour}-{self.library_version}-{targets}-{digest}"

    def to_dict(self) -> dict[str, Any]:
        """Return the build as JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "EngineBuild":
        """Read what `to_dict` gave.

        Raises:
            LookupError: Something is missing.
            TypeError: Something is of another type, or should not be there.
            ValueError: A value that is none of those possible.
        """
        build = cls(**dict(raw))
        for value, names in (
            (build.flavour, Flavour),
            (build.layout, Layout),
            (build.attention, Attention),
        ):
            _one_of(value, names)
        return dataclasses.replace(
            build,
            targets=tuple(map(str, raw["targets"])),
            limits=EngineLimits(**raw["limits"]),
            graphs={phase: str(raw["graphs"][phase]) for phase in PHASES},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the plan of a phase is.

    Attributes:
        path: File in the engine's folder.
        profile: Index of the phase's optimization profile.
    """

    path: str
    profile: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineManifest:
    """The contents of `engine.json`.

    Attributes:
        model: The model.
        cache_dtype: What the KV cache holds.
        build: What the plans were built from and for.
        plans: Plan of each phase; one file for both in layout `one-engine`.
        tokenizer: Paths of the tokenizer's files; empty unless packed to be shipped.
        generation: Path of generation_config.json, or None.
        model_max_seq_len: Longest sequence the model was made for, in tokens.
        files: Size and hash of every file but this one.
        versions: Versions of what made the engine.
    """

    model: GemmaConfig
    cache_dtype: DType
    build: EngineBuild
    plans: Mapping[Phase, Plan]
    tokenizer: tuple[str, ...]
    generation: str | None
    model_max_seq_len: int
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]

    def spec(self, phase: Phase) -> GraphSpec:
        """Return what the plan of a phase takes and gives, its cache of a fixed length.

        In layout `one-engine` both phases run the prefill graph: a decode step has S = L = 1 there and
        takes `logits_index` too.
        """
        graph: Phase = "prefill" if self.build.layout == "one-engine" else phase
        return engine_spec(self.model, graph, self.cache_dtype, self.build.limits)

    def to_json(self) -> str:
        """Return the text of `engine.json`."""
        # A model's own values are not all such that `asdict` could copy them.
        body = {
            "format_version": FORMAT_VERSION,
            "model": self.model.to_dict(),
            "cache_dtype": self.cache_dtype,
            "build": self.build.to_dict(),
            "plans": {phase: dataclasses.asdict(plan) for phase, plan in self.plans.items()},
            "tokenizer": list(self.tokenizer),
            "generation": self.generation,
            "model_max_seq_len": self.model_max_seq_len,
            "files": {path: dataclasses.asdict(record) for path, record in self.files.items()},
            "versions": dict(self.versions),
        }
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


def engine_spec(
    config: GemmaConfig, phase: Phase, cache_dtype: DType, limits: EngineLimits
) -> GraphSpec:
    """Return what an engine takes and gives.

    The graph's inputs and outputs with T as a number, and in addition `top_logits` float32 [B, L, k]
    in descending order, their `top_indices` int64 [B, L, k], and `logits_sum` float32 [B, L], which is
    finite only if every logit is.
    """
    spec = graph_spec(config, phase, cache_dtype)
    positions = spec.outputs[0].dims[1]
    k = limits.num_candidates
    picked = (
        TensorSpec(name=TOP_LOGITS, dtype="float32", dims=("B", positions, k)),
        TensorSpec(name=TOP_INDICES, dtype="int64", dims=("B", positions, k)),
        TensorSpec(name=LOGITS_SUM, dtype="float32", dims=("B", positions)),
    )

    def fixed(tensor: TensorSpec) -> TensorSpec:
        dims = tuple(limits.max_seq_len if dim == "T" else dim for dim in tensor.dims)
        return dataclasses.replace(tensor, dims=dims)

    inputs = tuple(map(fixed, spec.inputs))
    outputs = (spec.outputs[0], *picked, *map(fixed, spec.outputs[1:]))
    return dataclasses.replace(spec, inputs=inputs, outputs=outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFolder:
    """An engine on disk, its manifest read and its file sizes checked."""

    folder: Path
    manifest: EngineManifest

    @classmethod
    def open(cls, folder: Path) -> "EngineFolder":
        """Read `engine.json`; check the version, the paths and the sizes.

        Hashes are not computed here (see `changed_files`).

        Raises:
            EngineError: No manifest, a broken one, or files that are missing or of another size.
            BundleVersionError: A format this version does not know.
            UnsafePathError: A path that leaves the folder.
        """
        manifest = _parse(_read(folder / ENGINE_FILE))
        for name, record in manifest.files.items():
            path = safe_path(folder, name, ENGINE_FILE)
            size = path.stat().st_size if path.is_file() else None
            if size != record.size_bytes:
                found = "is missing" if size is None else f"has {size:,} bytes"
                raise EngineError(
                    f"{path} {found}, {ENGINE_FILE} says {record.size_bytes:,} bytes: the engine is "
                    "incomplete or was changed; copy it again, or build it again"
                )
        referenced = [plan.path for plan in manifest.plans.values()]
        referenced += [*manifest.tokenizer, *([manifest.generation] if manifest.generation else [])]
        for name in referenced:
            if name not in manifest.files:
                raise EngineError(
                    f"{folder / ENGINE_FILE} refers to {name!r}, which is not among its files: "
                    "build the engine again"
                )
        return cls(folder=folder, manifest=manifest)

    def plan_path(self, phase: Phase) -> Path:
        """Return the path of a phase's plan."""
        return self.folder / self.manifest.plans[phase].path

    def generation_config(self) -> dict[str, Any]:
        """Return the parsed generation_config.json; empty when there is none.

        Raises:
            EngineError: The file is not a JSON object.
        """
        if self.manifest.generation is None:
            return {}
        return _read(self.folder / self.manifest.generation)

    def changed_files(self, on_bytes: Callable[[int], object] = lambda _: None) -> list[str]:
        """Hash every file and return the paths whose SHA-256 is not the manifest's.

        Args:
            on_bytes: Called with the number of bytes hashed since the last call, for progress.
        """
        return [
            name
            for name, record in self.manifest.files.items()
            if sha256_of(self.folder / name, on_bytes) != record.sha256
        ]


def engines_of(bundle: Bundle) -> tuple[list[EngineFolder], dict[str, GemmaDeployError]]:
    """Return the engines kept in a bundle, the latest built first.

    Beside them what is wrong with those that cannot be opened, by the name of their folder: one
    damaged engine does not stand in the way of the others.
    """
    # Hidden ones belong to builds that have not ended, or were killed.
    folders = [
        path.parent
        for path in (bundle.folder / ENGINES_FOLDER).glob(f"*/{ENGINE_FILE}")
        if not path.parent.name.startswith(".")
    ]
    folders.sort(key=lambda folder: (folder / ENGINE_FILE).stat().st_mtime_ns, reverse=True)
    engines: list[EngineFolder] = []
    damaged: dict[str, GemmaDeployError] = {}
    for folder in folders:
        try:
            engines.append(EngineFolder.open(folder))
        except (EngineError, BundleVersionError, UnsafePathError) as err:
            damaged[folder.name] = err
    return engines, damaged


def engines_of_flavour(bundle: Bundle, flavour: Flavour) -> list[EngineFolder]:
    """Return a bundle's engines of a flavour, the latest built first.

    Raises:
        EngineError: There is none, with the command that builds one; or none that can be opened.
        BundleError: There is none, and the bundle has no graphs to build one from.
    """
    opened, damaged = engines_of(bundle)
    engines = [one for one in opened if one.manifest.build.flavour == flavour]
    if not engines:
        said = "".join(f" {name} cannot be opened: {err}." for name, err in damaged.items())
        bundle.manifest.precision_of("tensorrt")  # a bundle of which none can be built says so
        raise EngineError(
            f"{bundle.folder} has no {flavour} engine: `gemma-deploy build "
            f"{shlex.quote(str(bundle.folder))} --backend {flavour}` builds one.{said}"
        )
    return engines


def describe_build(build: EngineBuild) -> str:
    """Return in a line what tells engines apart that have the library and the targets in common."""
    limits = build.limits
    return (
        f"batches of {limits.max_batch_size}, {limits.max_seq_len:,} tokens, {build.layout}, attention "
        f"{build.attention}"
    )


def build_command(bundle: Path, build: EngineBuild, *, force: bool = False) -> str:
    """Return the command line that makes such an engine again, with the library now installed.

    Args:
        bundle: The bundle's folder.
        build: What the engine is to be like.
        force: Whether to build it although the very same one is there.
    """
    limits = build.limits
    options = [
        f"--backend {build.flavour}",
        f"--max-batch {limits.max_batch_size}",
        f"--max-seq-len {limits.max_seq_len}",
        f"--prefill-chunk {limits.max_step_tokens}",
        f"--max-logits {limits.max_logits}",
        f"--top-logits {limits.num_candidates}",
    ]
    if build.flavour == "tensorrt-rtx":  # the other one builds for the GPU at hand only
        options += [f"--compute-capability {target}" for target in build.targets]
    if build.layout != "one-engine":
        options.append(f"--layout {build.layout}")
    if build.attention != "auto":
        options.append(f"--attention {build.attention}")
    if force:
        options.append("--force")
    return f"gemma-deploy build {shlex.quote(str(bundle))} {' '.join(options)}"


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise EngineError(f"{path.parent} is not an engine: it has no {path.name}") from err
    except (OSError, ValueError, RecursionError) as err:
        raise EngineError(f"{path} cannot be read as JSON: {err}") from err
    if not isinstance(raw, dict):
        raise EngineError(f"{path} holds {type(raw).__name__}, expected a JSON object")
    return raw


def _parse(raw: Mapping[str, Any]) -> EngineManifest:
    version = raw.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleVersionError(
            f"{ENGINE_FILE} has format {version}, this gemma-deploy reads up to {FORMAT_VERSION}: "
            "upgrade with `pip install --upgrade gemma-deploy`"
        )
    try:
        manifest = EngineManifest(
            model=GemmaConfig.from_dict(raw["model"]),
            cache_dtype=cast(DType, _one_of(raw["cache_dtype"], DType)),
            build=EngineBuild.from_dict(raw["build"]),
            plans={phase: Plan(**raw["plans"][phase]) for phase in PHASES},
            tokenizer=tuple(map(str, raw["tokenizer"])),
            generation=None if raw["generation"] is None else str(raw["generation"]),
            model_max_seq_len=int(raw["model_max_seq_len"]),
            files={path: FileRecord(**record) for path, record in raw["files"].items()},
            versions=dict(raw["versions"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError, ConfigError) as err:
        raise EngineError(
            f"{ENGINE_FILE} is damaged ({type(err).__name__}: {err}): build the engine again"
        ) from err
    return manifest


def _one_of(value: object, names: Any) -> object:
    if value not in get_args(names):
        raise ValueError(f"{value!r} is none of {', '.join(get_args(names))}")
    return value

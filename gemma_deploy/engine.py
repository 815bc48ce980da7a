"""The engine folder: TensorRT plans, and the manifest that says what they are and where they run."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_deploy.bundle import Bundle, unlisted_file
from gemma_deploy.checkpoint_source import CheckpointSource
from gemma_deploy.config import GemmaConfig
from gemma_deploy.engine_build import EngineBuild, engine_spec
from gemma_deploy.errors import (
    BundleVersionError,
    ConfigError,
    EngineError,
    GemmaDeployError,
    UnsafePathError,
)
from gemma_deploy.file_identity import Snapshot
from gemma_deploy.file_records import FileRecord, changed_files, wrong_file
from gemma_deploy.graph_spec import (
    PHASES,
    DType,
    GraphSpec,
    Phase,
)
from gemma_deploy.install_hint import install_line
from gemma_deploy.json_files import read_json
from gemma_deploy.json_values import typed, whole
from gemma_deploy.limits import MAX_CONFIG_BYTES, MAX_METADATA_BYTES, MAX_POSITIONS
from gemma_deploy.tensorrt.library import Flavour

ENGINE_FILE = "engine.json"
ENGINES_FOLDER = "engines"
FORMAT_VERSION = 1


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
        source: The checkpoint that the bundle was made of; None where nothing says.
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
    source: CheckpointSource | None = None

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
            "source": None if self.source is None else self.source.to_dict(),
        }
        return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFolder:
    """An engine on disk, its manifest read and its file sizes checked.

    Attributes:
        folder: Where it is.
        manifest: What it says of itself.
        snapshot: What its files were when it was opened.
    """

    folder: Path
    manifest: EngineManifest
    snapshot: Snapshot = field(default_factory=Snapshot, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> "EngineFolder":
        """Read `engine.json`; check the version, the paths and the sizes.

        Hashes are not computed here (see `changed_files`).

        Raises:
            EngineError: No manifest, a broken one, files that are missing or of another size, or a
                tokenizer or generation file that the manifest does not list.
            BundleVersionError: A format this version does not know.
            UnsafePathError: A path that leaves the folder.
        """
        first = Snapshot.of(folder, [ENGINE_FILE])
        manifest = _parse(_read(folder / ENGINE_FILE))
        wrong = wrong_file(folder, manifest.files, ENGINE_FILE, called=ENGINE_FILE)
        if wrong is not None:
            raise EngineError(
                f"{wrong}: the engine is incomplete or was changed; copy it again, or build it again"
            )
        referenced = [plan.path for plan in manifest.plans.values()]
        referenced += [*manifest.tokenizer, *([manifest.generation] if manifest.generation else [])]
        for name in referenced:
            if name not in manifest.files:
                raise EngineError(
                    f"{folder / ENGINE_FILE} refers to {name!r}, which is not among its files: "
                    "build the engine again"
                )
        unlisted = unlisted_file(folder, manifest.files)
        if unlisted is not None:
            raise EngineError(
                f"{unlisted} that {ENGINE_FILE} does not list: it was "
                "not packed with the engine; remove it, or pack the engine again from a bundle with it"
            )
        snapshot = first.joined(Snapshot.of(folder, manifest.files))
        return cls(folder=folder, manifest=manifest, snapshot=snapshot)

    def check_unchanged(self) -> None:
        """Make sure that all that was read since `open` was read of one engine.

        Raises:
            EngineError: The folder or one of its files was replaced or changed.
        """
        self.snapshot.check(EngineError, "the engine was being loaded")

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
        return _read(self.folder / self.manifest.generation, MAX_CONFIG_BYTES)

    def changed_files(self, on_bytes: Callable[[int], object] = lambda _: None) -> list[str]:
        """Hash every file and return the paths whose SHA-256 is not the manifest's.

        Args:
            on_bytes: Called with the number of bytes hashed since the last call, for progress.
        """
        return changed_files(self.folder, self.manifest.files, on_bytes)


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


def _read(path: Path, max_bytes: int = MAX_METADATA_BYTES) -> dict[str, Any]:
    if not path.exists():
        raise EngineError(f"{path.parent} is not an engine: it has no {path.name}")
    return read_json(
        path,
        max_bytes=max_bytes,
        error=EngineError,
        remedy="copy the engine again, or build it again",
    )


def _parse(raw: Mapping[str, Any]) -> EngineManifest:
    version = raw.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleVersionError(
            f"{ENGINE_FILE} has format {version}, this gemma-deploy reads up to {FORMAT_VERSION}: "
            f"upgrade it: get the newer source, and {install_line()}"
        )
    try:
        manifest = EngineManifest(
            model=GemmaConfig.from_dict(raw["model"]),
            cache_dtype=typed(DType, raw["cache_dtype"], "cache_dtype"),
            build=EngineBuild.from_dict(raw["build"]),
            plans={phase: typed(Plan, raw["plans"][phase], f"plans.{phase}") for phase in PHASES},
            tokenizer=typed(tuple[str, ...], raw["tokenizer"], "tokenizer"),
            generation=typed(str | None, raw["generation"], "generation"),
            model_max_seq_len=whole(
                raw["model_max_seq_len"], "model_max_seq_len", 1, MAX_POSITIONS
            ),
            files=typed(Mapping[str, FileRecord], raw["files"], "files"),
            versions=typed(Mapping[str, str], raw["versions"], "versions"),
            source=CheckpointSource.from_dict(raw.get("source")),
        )
    except (LookupError, TypeError, ValueError, ConfigError) as err:
        raise EngineError(
            f"{ENGINE_FILE} is damaged ({type(err).__name__}: {err}): build the engine again"
        ) from err
    return manifest

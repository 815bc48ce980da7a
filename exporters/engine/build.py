"""Bundle to engine folder: `build_engine`."""

import importlib.util
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_deploy.bundle import Bundle
from gemma_deploy.cuda_driver import Gpu, read_driver
from gemma_deploy.engine import ENGINE_FILE, ENGINES_FOLDER, EngineFolder, EngineManifest, Plan
from gemma_deploy.engine_build import EngineBuild
from gemma_deploy.errors import (
    BackendUnavailableError,
    BundleError,
    EngineBuildError,
    EngineError,
    ExportError,
)
from gemma_deploy.exporters.engine.attention import check_attention, check_plugin, uses_plugin
from gemma_deploy.exporters.engine.builder import OnProgress, check_features
from gemma_deploy.exporters.engine.options import BuildOptions
from gemma_deploy.exporters.engine.process import build_in_child
from gemma_deploy.exporters.engine.resources import check_resources
from gemma_deploy.exporters.engine.targets import choose_targets
from gemma_deploy.file_records import FileRecord, sha256_of
from gemma_deploy.graph_spec import PHASES, Phase
from gemma_deploy.plugins.attention import PLUGIN_VERSION
from gemma_deploy.staging import staged_folder
from gemma_deploy.tensorrt import TensorRTLibrary, load_library

if TYPE_CHECKING:  # a module that was imported before warns when it is run
    from gemma_deploy.exporters.engine.child import BuildRequest

_PRODUCERS = ("gemma-deploy", "onnx", "onnx-ir", "tensorrt", "tensorrt-rtx", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """What `build_engine` gives.

    Attributes:
        engine: The engine, in the bundle.
        is_new: Whether it was built now; otherwise it was there already.
    """

    engine: EngineFolder
    is_new: bool


def build_engine(
    bundle: Bundle,
    options: BuildOptions,
    *,
    force: bool = False,
    on_progress: OnProgress = lambda *_: None,
) -> BuiltEngine:
    """Build the engine of a bundle, or find it built.

    It is kept in the bundle, under `engines/` and a key of everything that decides what it is, and
    appears there whole or not at all. The library runs in a child process: that it crashes, or that
    memory runs out, is an error here.

    Args:
        bundle: Has TensorRT graphs, in float16 or bfloat16.
        options: What to build.
        force: Whether to build an engine that is there already again.
        on_progress: Called as the work goes on.

    Raises:
        RequestError: Options that the model or the library cannot serve.
        BackendUnavailableError: The library is not installed or too old, or the GPU is missing that
            it builds for.
        BundleError: The bundle has no TensorRT graphs, or they were changed.
        EngineBuildError: Memory or disk do not suffice, or the build failed; nothing is left behind.
    """
    _check_installed()
    library = load_library(options.flavour)
    check_features(library)
    build = plan_build(bundle, options, library, read_driver()[1])
    folder = bundle.folder / ENGINES_FOLDER / build.key
    existing = None if force else _existing(folder)
    if existing is not None:
        return BuiltEngine(engine=existing, is_new=False)
    weights_bytes = bundle.manifest.files[bundle.manifest.weights].size_bytes
    check_resources(bundle.folder, build, weights_bytes)
    try:
        # What is there is either to be replaced or damaged.
        with staged_folder(folder, force=True, replaceable=ENGINE_FILE) as staging:
            plans, files = _build_plans(bundle, build, staging, on_progress)
            bundle.check_unchanged("an engine was being built of it")
            manifest = EngineManifest(
                model=bundle.config,
                cache_dtype=bundle.manifest.precision_of("tensorrt").activations,
                build=build,
                plans=plans,
                tokenizer=(),
                generation=None,
                model_max_seq_len=bundle.manifest.max_seq_len,
                files=files,
                versions=_versions(),
                source=bundle.manifest.source,
            )
            (staging / ENGINE_FILE).write_text(manifest.to_json(), encoding="utf-8")
    except ExportError as err:  # what writing a folder can fail with
        raise EngineBuildError(str(err)) from err
    return BuiltEngine(engine=EngineFolder.open(folder), is_new=True)


def plan_build(
    bundle: Bundle, options: BuildOptions, library: TensorRTLibrary, gpus: Sequence[Gpu]
) -> EngineBuild:
    """Return what exactly is to be built; refuse what cannot be.

    Args:
        bundle: What to build from.
        options: The choices.
        library: What builds.
        gpus: The GPUs of this machine.

    Raises:
        RequestError: Options that the model or the library cannot serve.
        BackendUnavailableError: A GPU is missing.
        BundleError: The bundle has no TensorRT graphs, or they were changed.
    """
    manifest = bundle.manifest
    dtype = manifest.precision_of("tensorrt").activations
    limits = options.limits(manifest)
    schemes = sorted({weight_format.scheme for weight_format in manifest.formats.values()})
    targets = choose_targets(library, options.compute_capabilities, gpus, (dtype, *schemes))
    check_attention(bundle.config, options.attention, library)
    has_plugin = uses_plugin(bundle.config, options.attention, library)
    if has_plugin and dtype != "float32":
        check_plugin(bundle.config, dtype, targets)
    return EngineBuild(
        flavour=options.flavour,
        library_version=library.version,
        targets=targets,
        layout=options.layout,
        attention=options.attention,
        plugin_version=PLUGIN_VERSION if has_plugin else None,
        limits=limits,
        graphs={phase: _graph_hash(bundle, phase) for phase in PHASES},
        weights=manifest.files[manifest.weights].sha256,
    )


def _check_installed() -> None:
    """Refuse to start a child process that would miss what rewrites graphs.

    Raises:
        BackendUnavailableError: With the install line.
    """
    missing = [name for name in ("onnx", "onnx_ir") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"building engines needs {' and '.join(missing)}, which devices do without: build on "
            "another machine, or pip install onnx onnx-ir"
        )


def _graph_hash(bundle: Bundle, phase: Phase) -> str:
    """Return the hash that the manifest states for a phase's graph, if it is the file's."""
    name = bundle.manifest.graph_file(phase, "tensorrt")
    stated = bundle.manifest.files[name].sha256
    if sha256_of(bundle.folder / name) != stated:
        raise BundleError(
            f"{bundle.folder / name} was changed: its SHA-256 is not the manifest's. It may belong to "
            "another bundle; copy this one again, or export it again"
        )
    return stated


def _existing(folder: Path) -> EngineFolder | None:
    """Return the engine in a folder; None if there is none, a damaged one, or one of other code."""
    try:
        engine = EngineFolder.open(folder)
    except EngineError:
        return None
    # What rewrites the graph and compiles the kernels is not in the key: an engine of an older version
    # still runs, but asking for it again is asking for what the present one makes.
    names = ["gemma-deploy", *(["triton"] if engine.manifest.build.plugin_version else [])]
    made_with, now = engine.manifest.versions, _versions()
    if any(made_with.get(name) != now.get(name) for name in names):
        return None
    return engine


def _build_plans(
    bundle: Bundle, build: EngineBuild, staging: Path, on_progress: OnProgress
) -> tuple[dict[Phase, Plan], dict[str, FileRecord]]:
    """Build every plan into a folder, one process after the other: memory is needed for one."""
    paths: dict[Phase, str]
    if build.layout == "one-engine":
        paths = {"prefill": "engine.plan"}
        plans = {
            phase: Plan(path="engine.plan", profile=index) for index, phase in enumerate(PHASES)
        }
    else:
        paths = {phase: f"{phase}.plan" for phase in PHASES}
        plans = {phase: Plan(path=path, profile=0) for phase, path in paths.items()}
    files = {}
    for phase, path in paths.items():
        request: BuildRequest = {
            "bundle": str(bundle.folder.absolute()),
            "build": build.to_dict(),
            "phase": phase,
            "plan": str(staging / path),
        }
        if len(paths) == 1:
            files[path] = build_in_child(request, on_progress)
        else:
            files[path] = build_in_child(request, _named(phase, on_progress))
    return plans, files


def _named(phase: Phase, on_progress: OnProgress) -> OnProgress:
    """Tell the stages of one plan from the other's."""
    return lambda stage, done, total: on_progress(f"{stage} ({phase})", done, total)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PRODUCERS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # of the two flavours, one is enough
    return versions

"""Whether an engine runs here, as far as can be told before it is loaded, and how to get one that does."""

import dataclasses
from pathlib import Path

from gemma_deploy.bundle import Bundle
from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.engine import EngineFolder
from gemma_deploy.engine_build import EngineBuild, build_command
from gemma_deploy.graph_spec import PHASES


def why_not_with(build: EngineBuild, library_version: str) -> str | None:
    """Return why an engine cannot be loaded by a version of its library; None if it can."""
    if build.library_version == library_version:
        return None
    return (
        f"it was built with {build.flavour} {build.library_version}, {library_version} is installed, "
        "and only the version that built an engine loads it"
    )


def why_not_on(build: EngineBuild, gpu: Gpu) -> str | None:
    """Return why an engine cannot run on a GPU; None if it was built for its compute capability."""
    capability = capability_of(gpu)
    if capability in build.targets:
        return None
    return f"it was built for compute capability {', '.join(build.targets)}, {gpu.name} has {capability}"


def why_not_of(build: EngineBuild, bundle: Bundle) -> str | None:
    """Return why an engine is not one of a bundle's present graphs and weights; None if it is."""
    manifest = bundle.manifest
    if "tensorrt" not in manifest.lowerings:
        return "the bundle has no tensorrt graphs"
    now = {phase: manifest.files[manifest.graph_file(phase, "tensorrt")] for phase in PHASES}
    changed = [phase for phase in PHASES if build.graphs.get(phase) != now[phase].sha256]
    if changed:
        return f"the bundle's {' and '.join(changed)} graph changed after it was built"
    if build.weights != manifest.files[manifest.weights].sha256:
        return "the bundle's weights changed after it was built"
    return None


def rebuild_advice(
    engine: EngineFolder,
    gpu: Gpu | None = None,
    max_seq_len: int | None = None,
    *,
    force: bool = False,
) -> str:
    """Return the command that makes an engine again.

    Args:
        engine: What it is to be like.
        gpu: The GPU it is to run on; None for those it was built for.
        max_seq_len: Tokens its KV cache must hold; None for as many as it does.
        force: Whether it must be built although the very same one is there: it is damaged.
    """
    build = engine.manifest.build
    if gpu is not None:
        build = dataclasses.replace(build, targets=(capability_of(gpu),))
    if max_seq_len is not None and max_seq_len > build.limits.max_seq_len:
        limits = dataclasses.replace(build.limits, max_seq_len=max_seq_len)
        build = dataclasses.replace(build, limits=limits)
    folder = Path("BUNDLE") if is_packed(engine) else engine.folder.parent.parent
    command = build_command(folder, build, force=force)
    if is_packed(engine):
        return (
            f"build it again from its bundle, `{command}`, then "
            f"`gemma-deploy pack BUNDLE --backend {build.flavour} --output {engine.folder}`"
        )
    return f"build it again: `{command}`"


def is_packed(engine: EngineFolder) -> bool:
    """Tell whether an engine folder holds all it needs to be shipped by itself."""
    return bool(engine.manifest.tokenizer)


def capability_of(gpu: Gpu) -> str:
    """Return a GPU's compute capability as engines state it, e.g. `8.9`."""
    return "{}.{}".format(*gpu.compute_capability)

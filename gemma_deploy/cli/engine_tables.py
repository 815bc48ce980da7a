"""What `inspect` prints of TensorRT engines: one in a folder of its own, or those of a bundle."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.cli.console import emit_table

if TYPE_CHECKING:
    from gemma_deploy.engine import EngineFolder
    from gemma_deploy.engine_build import EngineBuild


def emit_engine(engine: "EngineFolder", model: Sequence[tuple[str, str]]) -> None:
    """Write what an engine is to stdout.

    Args:
        engine: The engine.
        model: Lines about its model.
    """
    from gemma_deploy.inspection import plan_sizes

    manifest = engine.manifest
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    facts = [
        *_build_facts(manifest.build),
        ("KV cache", manifest.cache_dtype),
        ("tokenizer", ", ".join(manifest.tokenizer) or "none"),
        ("generation", manifest.generation or "none"),
        ("made of", str(manifest.source or "unknown")),
        ("made by", versions or "unknown"),
    ]
    emit_table(facts, title=f"Engine {engine.folder}")
    emit_table(model, title="Model")
    sizes = plan_sizes(engine)
    plans = [(path, format_bytes(size)) for path, size in sizes.items()]
    emit_table([*plans, ("total", format_bytes(sum(sizes.values())))], title="Plans")


def emit_engines(engines: Sequence["EngineFolder"], damaged: Mapping[str, str]) -> None:
    """Write a line for each engine of a bundle to stdout; nothing if it has none.

    Args:
        engines: Those that can be opened.
        damaged: What is wrong with the others, by name.
    """
    rows = [(engine.folder.name, _summary(engine)) for engine in engines]
    rows += [(name, f"cannot be opened: {reason}") for name, reason in damaged.items()]
    if rows:
        emit_table(rows, title="Engines")


def _summary(engine: "EngineFolder") -> str:
    from gemma_deploy.engine_build import describe_build
    from gemma_deploy.inspection import plan_sizes

    size = format_bytes(sum(plan_sizes(engine).values()))
    return f"{describe_build(engine.manifest.build)}, {size}"


def _build_facts(build: "EngineBuild") -> list[tuple[str, str]]:
    limits = build.limits
    plugin = f", plugin version {build.plugin_version}" if build.plugin_version else ", no plugin"
    return [
        ("library", f"{build.flavour} {build.library_version}; no other version loads it"),
        ("built for", f"compute capability {', '.join(build.targets)}"),
        ("layout", build.layout),
        ("attention", f"{build.attention}{plugin}"),
        ("limits", f"batches of {limits.max_batch_size}"),
        ("", f"{limits.max_seq_len} tokens of prompt and answer together"),
        ("", f"{limits.max_step_tokens} tokens of a prompt in a step"),
        ("", f"positions of a row with logits, in a step: {limits.max_logits}"),
        ("", f"largest logits picked out on the GPU: {limits.num_candidates}"),
    ]

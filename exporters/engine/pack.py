"""An engine made ready to ship: its plans with all that generating needs, `pack_engine`."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from gemma_deploy.bundle import Bundle
from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.checkpoint_files import is_licence
from gemma_deploy.engine import ENGINE_FILE, EngineFolder, engines_of, engines_of_flavour
from gemma_deploy.engine_build import describe_build
from gemma_deploy.engine_fit import rebuild_advice, why_not_of
from gemma_deploy.errors import EngineError, ExportError, RequestError
from gemma_deploy.file_records import FileRecord
from gemma_deploy.staging import check_replaceable, staged_folder
from gemma_deploy.tensorrt import Flavour

_BLOCK_BYTES: Final = 8 << 20
_MANIFEST_BYTES: Final = 1 << 20


def pack_engine(
    bundle: Bundle,
    flavour: Flavour,
    output: Path,
    *,
    key: str | None = None,
    force: bool = False,
    on_progress: Callable[[str, int, int], object] = lambda *_: None,
) -> EngineFolder:
    """Write a folder that runs by itself: plans, tokenizer, generation and licence files.

    It holds neither the weights file nor the ONNX graphs, and appears whole or not at all.

    Args:
        bundle: Holds the engine.
        flavour: Of the engine.
        output: The folder to create.
        key: Name of the engine's folder in the bundle; None for the only one of the flavour.
        force: Whether an engine at `output` may be replaced.
        on_progress: Called as files are copied.

    Raises:
        RequestError: The bundle has several such engines and `key` says none, or no such engine.
        EngineError: The engine is damaged, or was built from other graphs or weights.
        OutputExistsError: `output` exists and `force` is False, or it is no engine.
        ExportError: `output` cannot be written; nothing was left behind.
    """
    check_replaceable(output.absolute(), force=force, replaceable=ENGINE_FILE)
    engine = choose_engine(bundle, flavour, key)
    _check_not_inside(bundle, output)
    names = _texts(bundle)
    records = {name: bundle.manifest.files[name] for name in names} | dict(engine.manifest.files)
    sources = {name: bundle.folder / name for name in names}
    sources |= {name: engine.folder / name for name in engine.manifest.files}
    manifest = dataclasses.replace(
        engine.manifest,
        tokenizer=bundle.manifest.tokenizer,
        generation=bundle.manifest.generation,
        files=records,
        source=bundle.manifest.source,
    )
    with staged_folder(output, force=force, replaceable=ENGINE_FILE) as folder:
        _require_space(folder, records, output)
        total, done = sum(record.size_bytes for record in records.values()), 0
        for name, record in records.items():
            for count in _copy(sources[name], folder / name, record):
                done += count
                on_progress("copying", done, total)
        (folder / ENGINE_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return EngineFolder.open(output)


def choose_engine(bundle: Bundle, flavour: Flavour, key: str | None) -> EngineFolder:
    """Return the engine of a bundle that is meant.

    Raises:
        RequestError: There are several of the flavour and no key, or none of that key.
        EngineError: There is none of the flavour, it is damaged, or it was built from other graphs or
            weights.
    """
    damaged = engines_of(bundle)[1]
    if key in damaged:
        raise damaged[key]
    found = engines_of_flavour(bundle, flavour)
    listed = "".join(f"\n  {x.folder.name}: {describe_build(x.manifest.build)}" for x in found)
    listed += "".join(f"\n  {name}: damaged" for name in damaged)
    if key is not None:
        found = [x for x in found if x.folder.name == key]
        if not found:
            raise RequestError(f"{bundle.folder} has no {flavour} engine {key!r}; it has{listed}")
    elif len(found) + len(damaged) > 1:
        raise RequestError(
            f"{bundle.folder} has several engines; choose one with --engine:{listed}"
        )
    _check_belongs(bundle, found[0])
    return found[0]


def _check_belongs(bundle: Bundle, engine: EngineFolder) -> None:
    """Refuse an engine of a bundle that was exported again since."""
    reason = why_not_of(engine.manifest.build, bundle)
    if reason is not None:
        raise EngineError(f"{engine.folder} is out of date: {reason}; {rebuild_advice(engine)}")


def _texts(bundle: Bundle) -> Sequence[str]:
    """Return the names of the bundle's files that travel with an engine."""
    manifest = bundle.manifest
    generation = [manifest.generation] if manifest.generation else []
    licences = [name for name in manifest.files if is_licence(name)]
    return list(dict.fromkeys([*manifest.tokenizer, *generation, *licences]))


def _check_not_inside(bundle: Bundle, output: Path) -> None:
    if output.resolve().is_relative_to(bundle.folder.resolve()):
        raise RequestError(
            f"{output} lies in the bundle {bundle.folder}: choose an output outside of it"
        )


def _require_space(folder: Path, records: dict[str, FileRecord], output: Path) -> None:
    needed = sum(record.size_bytes for record in records.values()) + _MANIFEST_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"{output.parent} has {format_bytes(free)} free, the engine needs {format_bytes(needed)}: "
            "free space, or choose another output. Nothing was written"
        )


def _copy(source: Path, target: Path, record: FileRecord) -> Iterator[int]:
    """Copy a file, yield the size of each block; refuse it in the end if its hash is another."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            digest.update(block)
            writer.write(block)
            yield len(block)
    if digest.hexdigest() != record.sha256:
        raise EngineError(
            f"{source} was changed: its SHA-256 is not the one stated for it. Build the engine "
            "again with --force, or export the bundle again. Nothing was written"
        )

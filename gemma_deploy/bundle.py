"""The bundle: a folder of graphs, weights, tokenizer, and the manifest that describes them."""

import os
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import BundleError, RequestError
from gemma_deploy.file_identity import Snapshot
from gemma_deploy.file_records import changed_files, wrong_file
from gemma_deploy.graph_spec import Lowering, Phase
from gemma_deploy.json_files import read_json
from gemma_deploy.limits import MAX_CONFIG_BYTES, MAX_METADATA_BYTES
from gemma_deploy.manifest import MANIFEST_FILE, Manifest, parse_manifest
from gemma_deploy.overflow_report import OVERFLOW_FILE, OverflowReport
from gemma_deploy.quantization.choices import CHOICES_FILE, Choice, parse_choices

Report = TypeVar("Report")

WEIGHTS_FILE = "weights.safetensors"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle on disk, its manifest read and its file sizes checked.

    Attributes:
        folder: Where it is.
        manifest: What it says of itself.
        snapshot: What its files were when it was opened.
    """

    folder: Path
    manifest: Manifest
    snapshot: Snapshot = field(default_factory=Snapshot, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> "Bundle":
        """Read the manifest; check the version, the paths, the sizes and the graph specs.

        Hashes are not computed here (see `changed_files`).

        Raises:
            RequestError: There is no bundle at `folder`.
            BundleError: A broken manifest, a missing file or one of another size, or a
                tokenizer or generation file that the manifest does not list.
            BundleVersionError: A format this version does not know.
            UnsafePathError: A path that leaves the folder.
        """
        first = Snapshot.of(folder, [MANIFEST_FILE])
        manifest = parse_manifest(_read_manifest(folder), folder)
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
        unlisted = unlisted_file(folder, manifest.files)
        if unlisted is not None:
            raise BundleError(
                f"{unlisted} that {MANIFEST_FILE} does not list: it "
                "was not part of the export; remove it, or export the bundle again with it in the "
                "checkpoint"
            )
        snapshot = first.joined(Snapshot.of(folder, manifest.files))
        return cls(folder=folder, manifest=manifest, snapshot=snapshot)

    def check_unchanged(self, doing: str = "the bundle was being loaded") -> None:
        """Make sure that all that was read since `open` was read of one bundle.

        Args:
            doing: What it was read for, for the message.

        Raises:
            BundleError: The folder or one of its files was replaced or changed.
        """
        self.snapshot.check(BundleError, doing)

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
        return _json_object(self.folder / self.manifest.generation, MAX_CONFIG_BYTES)

    def overflow_report(self) -> OverflowReport | None:
        """Return what the export found of float16's range; None where nothing computes in float16.

        Raises:
            BundleError: The file is not such a report.
        """
        return self._report(OVERFLOW_FILE, OverflowReport.from_dict)

    def choices(self) -> tuple[Choice, ...] | None:
        """Return what formats were chosen by sensitivity; None where they were given.

        Raises:
            BundleError: The file is not such a list.
        """
        return self._report(CHOICES_FILE, parse_choices)

    def _report(self, name: str, parse: Callable[[dict[str, Any]], Report]) -> Report | None:
        """Parse a file that not all bundles have."""
        if name not in self.manifest.files:
            return None
        try:
            return parse(_json_object(self.folder / name))
        except (LookupError, TypeError, ValueError, RequestError) as err:
            raise BundleError(
                f"{self.folder / name} is damaged ({type(err).__name__}: {err}): export the bundle again"
            ) from err

    def changed_files(self, on_bytes: Callable[[int], object] = lambda _: None) -> list[str]:
        """Hash every file and return the paths whose SHA-256 is not the manifest's.

        Args:
            on_bytes: Called with the number of bytes hashed since the last call, for progress.
        """
        return changed_files(self.folder, self.manifest.files, on_bytes)


def _json_object(path: Path, max_bytes: int = MAX_METADATA_BYTES) -> dict[str, Any]:
    return read_json(
        path,
        max_bytes=max_bytes,
        error=BundleError,
        remedy="copy the bundle again or export it again",
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        if (folder.parent / MANIFEST_FILE).is_file():
            raise RequestError(f"{folder} is no folder; give the bundle's, {folder.parent}")
        found = "is a file" if folder.exists() else "does not exist"
        raise RequestError(
            f"{folder} {found}; expected the folder of a bundle, as `gemma-deploy export` makes it "
            "of a checkpoint"
        )
    if not path.is_file():
        hint = ""
        if (folder / "decode.onnx").is_file():
            hint = "; it holds a bundle's graphs: copy the bundle again, and whole"
        if (folder / "engine.json").is_file():
            hint = "; it is an engine: give the bundle that it was built from"
        if (folder / "config.json").is_file():
            hint = "; this looks like a checkpoint: run `gemma-deploy export` on it first"
        raise RequestError(f"{folder} is not a bundle: it has no {MANIFEST_FILE}{hint}")
    return _json_object(path)


def unlisted_file(folder: Path, listed: Container[str]) -> str | None:
    """Name a file that would decide what is generated though no size or hash covers it, or None.

    Args:
        folder: A bundle or an engine.
        listed: Names of the files that its manifest knows.
    """
    from gemma_deploy.tokenizer import GemmaTokenizer

    for path in GemmaTokenizer.files(folder):
        if path.name not in listed:
            return f"{path} is a tokenizer file"
    generation = folder / GENERATION_FILE
    if GENERATION_FILE not in listed and os.path.lexists(generation):
        return f"{generation} is a generation file"
    return None


def _referenced(manifest: Manifest) -> list[str]:
    generation = [manifest.generation] if manifest.generation else []
    graphs = [path for by_phase in manifest.graphs.values() for path in by_phase.values()]
    return [*graphs, manifest.weights, *manifest.tokenizer, *generation]

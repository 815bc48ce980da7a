"""What `gemma-deploy verify` finds, and the checks that bundles and engines have in common."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.cli.console import Progress
from gemma_deploy.errors import BundleError, CheckpointError, GemmaDeployError
from gemma_deploy.quoting import shortened

if TYPE_CHECKING:
    from gemma_deploy.bundle import Bundle
    from gemma_deploy.checkpoint import Checkpoint
    from gemma_deploy.config import GemmaConfig
    from gemma_deploy.engine import EngineFolder
    from gemma_deploy.parity import ParityReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a quantized bundle's predictions are from those of its checkpoint.

    Attributes:
        positions: Number of positions compared.
        mean_kl_nats: Mean of KL(checkpoint || bundle), in nats; None if a logit was no number.
        max_kl_nats: Its largest; None likewise.
        greedy_agreement: Share of positions with the same likeliest token.
    """

    positions: int
    mean_kl_nats: float | None
    max_kl_nats: float | None
    greedy_agreement: float

    @classmethod
    def of(cls, report: "ParityReport") -> "Distance":
        """Return what a comparison says of it."""
        return cls(**{field.name: getattr(report, field.name) for field in dataclasses.fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What one check found.

    Attributes:
        name: What was checked.
        is_ok: Whether it passed.
        detail: What was found.
        parity: The figures, of a comparison with the checkpoint, or with a quantized bundle's own
            weights.
        distance: How far a quantized bundle is from the checkpoint.
        warning: What a check that passed finds doubtful all the same, and what to do about it.
    """

    name: str
    is_ok: bool
    detail: str
    parity: "ParityReport | None" = None
    distance: "Distance | None" = None
    warning: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return dataclasses.asdict(self)


def passed(name: str, detail: str) -> Check:
    """Return a check that passed."""
    return Check(name=name, is_ok=True, detail=detail)


def require_same_model(folder: Path, config: "GemmaConfig", checkpoint: "Checkpoint") -> None:
    """Refuse a checkpoint that a folder was not made of: its config is another; the dtype may differ.

    Raises:
        CheckpointError: With the first field that differs.
    """
    ours, theirs = config.to_dict(), checkpoint.config.to_dict()
    for name in ours:
        if name != "dtype" and ours[name] != theirs[name]:
            raise CheckpointError(
                f"{checkpoint.folder} is not what {folder} was made of: its {name} is "
                f"{shortened(theirs[name])}, the bundle's {shortened(ours[name])}. Give the checkpoint that "
                "was exported"
            )


def check_hashes(folder: "Bundle | EngineFolder", on_progress: Progress, remedy: str) -> str:
    """Hash every file of a folder.

    Raises:
        BundleError: A file changed; with what else to do than to copy it again.
    """
    files = folder.manifest.files
    total, done = sum(record.size_bytes for record in files.values()), 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        on_progress("hashing", done, total)

    changed = folder.changed_files(on_bytes)
    if changed:
        raise BundleError(
            f"{', '.join(changed)} changed since they were made: SHA-256 is not what the manifest says. "
            f"Copy the folder again, or {remedy}"
        )
    return f"SHA-256 of {len(files)} files as the manifest says"


def engine_checks(folder: Path, on_progress: Progress) -> Iterator[Check]:
    """Check an engine folder's files, yield each check as it ends, and stop after one that fails."""
    from gemma_deploy.engine import EngineFolder
    from gemma_deploy.tokenizer import GemmaTokenizer

    name = "manifest"
    try:
        engine = EngineFolder.open(folder)
        build, files = engine.manifest.build, engine.manifest.files
        size = format_bytes(sum(record.size_bytes for record in files.values()))
        yield passed(
            name,
            f"{build.flavour} {build.library_version} for compute capability "
            f"{', '.join(build.targets)}; {len(files)} files of {size}, all there",
        )
        name = "hashes"
        yield passed(name, check_hashes(engine, on_progress, "build the engine again"))
        if engine.manifest.tokenizer:
            name = "tokenizer"
            found = GemmaTokenizer.from_pretrained(folder).vocab_size
            yield passed(name, f"{found} tokens, {engine.manifest.model.vocab_size} in the model")
    except GemmaDeployError as err:
        yield Check(name=name, is_ok=False, detail=str(err))

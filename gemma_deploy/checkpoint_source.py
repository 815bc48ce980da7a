"""Which checkpoint a bundle was made of, as its manifest states it: `CheckpointSource`."""

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from gemma_deploy.config import CONFIG_FILE
from gemma_deploy.file_records import sha256_of
from gemma_deploy.hub import is_hub_id
from gemma_deploy.json_values import typed
from gemma_deploy.quoting import shortened
from gemma_deploy.safetensors_files import stored_header, weight_files

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
# huggingface_hub's cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
_REPOSITORY_FOLDER: Final = re.compile(r"models--(?P<organization>.+?)--(?P<name>.+)")
_SNAPSHOTS: Final = "snapshots"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSource:
    """What tells a checkpoint from others; nothing of the machine it lay on.

    Attributes:
        config_sha256: SHA-256 of its config.json.
        headers_sha256: SHA-256 of the JSON headers of its weights files, one behind the other in the
            order of their names: of names, shapes and dtypes, not of the weights.
        hub_id: Its name on the hub, by where it lay in the hub's cache; None for any other folder.
        commit: Its commit there; None likewise.
    """

    config_sha256: str
    headers_sha256: str
    hub_id: str | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        """Refuse what none of the fields can be.

        Raises:
            ValueError: Stating the field.
        """
        for name in ("config_sha256", "headers_sha256"):
            _require(name, getattr(self, name), _SHA256, "64 hexadecimal digits")
        if (self.hub_id, self.commit) == (None, None):
            return
        if not isinstance(self.hub_id, str) or not is_hub_id(self.hub_id):
            raise ValueError(
                f"source.hub_id is {shortened(self.hub_id)}, expected organization/name"
            )
        _require("commit", self.commit, _COMMIT, "40 hexadecimal digits")

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Return the source that a checkpoint folder is; no weights are read.

        Args:
            folder: A checkpoint that can be opened (see `Checkpoint.open`).

        Raises:
            CheckpointError: Its weights files cannot be told, or the header of one cannot be read.
            OSError: A file cannot be read.
        """
        digest = hashlib.sha256()
        for path in weight_files(folder):
            digest.update(stored_header(path)[0])
        hub_id, commit = _place_in_cache(folder.resolve())
        return cls(
            config_sha256=sha256_of(folder / CONFIG_FILE),
            headers_sha256=digest.hexdigest(),
            hub_id=hub_id,
            commit=commit,
        )

    @classmethod
    def from_dict(cls, raw: object) -> Self | None:
        """Read what `to_dict` gave; None for None.

        Raises:
            ValueError: It is anything else.
        """
        source: Self | None = typed(cls | None, raw, "source")
        return source

    def to_dict(self) -> dict[str, Any]:
        """Return the source as JSON holds it."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        if self.hub_id is not None:
            return f"{self.hub_id}, commit {self.commit}"
        return (
            f"a folder, config.json {self.config_sha256[:12]}, headers {self.headers_sha256[:12]}"
        )


def _place_in_cache(folder: Path) -> tuple[str, str] | tuple[None, None]:
    """Return hub id and commit of a snapshot, `models--ORGANIZATION--NAME/snapshots/COMMIT`."""
    repository = _REPOSITORY_FOLDER.fullmatch(folder.parent.parent.name)
    if repository is None or folder.parent.name != _SNAPSHOTS or not _COMMIT.fullmatch(folder.name):
        return None, None
    hub_id = f"{repository['organization']}/{repository['name']}"
    return (hub_id, folder.name) if is_hub_id(hub_id) else (None, None)


def _require(name: str, value: object, pattern: re.Pattern[str], expected: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"source.{name} is {shortened(value)}, expected {expected}")

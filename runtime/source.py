"""Where a model comes from: the folder of a bundle, an engine or a checkpoint, told apart and opened."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gemma_deploy.bundle import GENERATION_FILE, Bundle
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_files import checkpoint_snapshot, explain_folder
from gemma_deploy.config import CONFIG_FILE, GemmaConfig
from gemma_deploy.engine import ENGINE_FILE, EngineFolder
from gemma_deploy.engine_fit import is_packed
from gemma_deploy.errors import BundleError, CheckpointError, EngineError, RequestError
from gemma_deploy.file_identity import Snapshot
from gemma_deploy.hub import is_hub_id
from gemma_deploy.json_files import read_json
from gemma_deploy.limits import MAX_CONFIG_BYTES
from gemma_deploy.manifest import MANIFEST_FILE
from gemma_deploy.quoting import shortened
from gemma_deploy.runtime.generation_config import GenerationDefaults
from gemma_deploy.user_paths import user_path

_USUAL_FOLDERS: Final = frozenset(
    {"build", "bundles", "checkpoints", "data", "dist", "engines", "models", "out", "output", "tmp"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A folder with a model.

    Attributes:
        folder: The folder.
        bundle: The opened bundle; None for anything else.
        engine: The opened engine, packed to be shipped; None for anything else.
        config: The model.
        generation_config: Contents of generation_config.json; empty without one.
        max_seq_len: Longest sequence the model is made for, in tokens.
        snapshot: What its files were when it was opened.
    """

    folder: Path
    bundle: Bundle | None
    engine: EngineFolder | None
    config: GemmaConfig
    generation_config: Mapping[str, Any]
    max_seq_len: int
    snapshot: Snapshot = field(default_factory=Snapshot, repr=False, compare=False)

    @classmethod
    def open(cls, given: str | Path) -> "ModelSource":
        """Open a bundle (manifest.json), a packed engine (engine.json) or a checkpoint (config.json).

        Args:
            given: The folder.

        Raises:
            RequestError: The path is none of them, or an engine without its tokenizer.
            BundleError: The bundle is damaged.
            EngineError: The engine is damaged.
            ConfigError: The checkpoint's config is not a Gemma's.
            CheckpointError: generation_config.json cannot be read.
        """
        if not isinstance(given, str | Path):
            raise RequestError(
                f"the model is {shortened(given)} ({type(given).__name__}); expected the path of a bundle, a checkpoint or "
                "an engine"
            )
        path = user_path(given)
        if (path / MANIFEST_FILE).is_file():
            bundle = Bundle.open(path)
            return cls(
                folder=path,
                bundle=bundle,
                engine=None,
                config=bundle.config,
                generation_config=bundle.generation_config(),
                max_seq_len=bundle.manifest.max_seq_len,
                snapshot=bundle.snapshot,
            )
        if (path / ENGINE_FILE).is_file():
            return cls._of_engine(EngineFolder.open(path))
        if not (path / CONFIG_FILE).is_file():
            raise RequestError(_explain_missing(path, str(given)))
        snapshot = checkpoint_snapshot(path)
        config = GemmaConfig.from_file(path)
        return cls(
            folder=path,
            bundle=None,
            engine=None,
            config=config,
            generation_config=_generation_config(path / GENERATION_FILE),
            max_seq_len=config.max_position_embeddings,
            snapshot=snapshot,
        )

    @classmethod
    def _of_engine(cls, engine: EngineFolder) -> "ModelSource":
        if not is_packed(engine):
            raise RequestError(
                f"{engine.folder} is an engine without a tokenizer: give the bundle it is in, "
                f"{engine.folder.parent.parent} with --backend {engine.manifest.build.flavour}, or "
                "pack it with `gemma-deploy pack`"
            )
        return cls(
            folder=engine.folder,
            bundle=None,
            engine=engine,
            config=engine.manifest.model,
            generation_config=engine.generation_config(),
            max_seq_len=engine.manifest.build.limits.max_seq_len,
            snapshot=engine.snapshot,
        )

    def check_unchanged(self) -> None:
        """Make sure that all that was read since `open` was read of one model.

        Raises:
            BundleError, EngineError, CheckpointError: The folder or one of its files was replaced or
                changed.
        """
        error = CheckpointError if self.engine is None else EngineError
        self.snapshot.check(
            error if self.bundle is None else BundleError, "the model was being loaded"
        )

    def stored_config(self) -> GemmaConfig:
        """Return the config that the folder's tensors have: a checkpoint's may differ from config.json.

        Raises:
            CheckpointError: As `Checkpoint.open`.
        """
        is_checkpoint = self.bundle is None and self.engine is None
        return Checkpoint.open(self.folder).config if is_checkpoint else self.config

    @property
    def generation_place(self) -> str:
        """What errors call the file that `generation_config` was read from."""
        return str(self.folder / GENERATION_FILE)

    def generation_defaults(self) -> GenerationDefaults:
        """Return what generation_config.json says of the choice of tokens.

        Raises:
            ConfigError: It holds what no model can have.
        """
        return GenerationDefaults.parse(self.generation_config, self.generation_place)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a text, by config.json and generation_config.json together.

        Raises:
            ConfigError: As `generation_defaults`.
        """
        return frozenset(self.config.eos_token_ids) | self.generation_defaults().eos_token_ids


def may_be_hub_id(text: str) -> bool:
    """Tell whether a path that does not exist reads as the name of a model on a hub.

    It does not if it reads as a mistyped path: what stands before the `/` is a folder here, or has a
    name that is given to folders for models.

    Args:
        text: The path as it was given: `./a/b` is none, and no longer to be told as a `Path`.
    """
    first = text.partition("/")[0]
    return is_hub_id(text) and first not in _USUAL_FOLDERS and not Path(first).exists()


def _explain_missing(path: Path, given: str) -> str:
    if path.exists():
        return f"{explain_folder(path)}; or a bundle, the folder that `gemma-deploy export` wrote"
    hint = ""
    if may_be_hub_id(given):
        hint = (
            ". If it is the id of a model on the hub, export it first: "
            f"`gemma-deploy export {given} --output BUNDLE`"
        )
    return f"{path} does not exist; expected the folder of a bundle or of a checkpoint{hint}"


def _generation_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    return read_json(
        path, max_bytes=MAX_CONFIG_BYTES, error=CheckpointError, remedy="download it again"
    )

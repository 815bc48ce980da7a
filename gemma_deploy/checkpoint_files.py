"""Which files make a checkpoint: its licences, and what a path is that is no checkpoint."""

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from gemma_deploy.config import CONFIG_FILE
from gemma_deploy.errors import RequestError
from gemma_deploy.file_identity import Snapshot
from gemma_deploy.json_files import read_json
from gemma_deploy.limits import MAX_CONFIG_BYTES

LICENCE_PATTERNS: Final = (
    "licen[cs]e*",
    "notice*",
    "*terms_of_use*",
    "*use_policy*",
    "copying*",
)
"""What licence files are called, in lower case; their names come in any case."""

ADAPTER_FILE: Final = "adapter_config.json"
"""What PEFT describes an adapter in."""

_CHECKPOINT: Final = (
    f"a checkpoint in Hugging Face layout: a folder with {CONFIG_FILE} and *.safetensors"
)
# Weights by the ends of their files' names, in the order in which a message prefers to name them.
_FOREIGN_WEIGHTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        ".gguf": "GGUF (llama.cpp's format, as a rule quantized)",
        ".msgpack": "Flax's msgpack",
        ".npz": "NumPy archives, as MLX writes them",
        ".h5": "HDF5, as TensorFlow and Keras write it",
        ".ocdbt": "Orbax (JAX)",
        ".tflite": "LiteRT",
        ".task": "LiteRT",
        ".litertlm": "LiteRT",
        ".onnx": "ONNX graphs",
        ".bin": "pickle, which runs arbitrary code when loaded",
        ".pt": "pickle, which runs arbitrary code when loaded",
        ".pth": "pickle, which runs arbitrary code when loaded",
        ".ckpt": "pickle, which runs arbitrary code when loaded",
    }
)
# A folder of the hub's cache keeps checkpoints two floors down: snapshots/COMMIT.
_NESTED: Final = (f"*/{CONFIG_FILE}", f"snapshots/*/{CONFIG_FILE}")


def is_licence(name: str) -> bool:
    """Tell whether a file of this name (no folder) states a licence or terms of use."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in LICENCE_PATTERNS)


def checkpoint_snapshot(folder: Path) -> Snapshot:
    """Return what the files are that a model is made of: config, weights, tokenizer, generation."""
    from gemma_deploy.tokenizer import GemmaTokenizer

    names = {CONFIG_FILE, "generation_config.json", "model.safetensors.index.json"}
    names |= {path.name for path in folder.glob("*.safetensors")}
    return Snapshot.of(folder, names | {path.name for path in GemmaTokenizer.files(folder)})


def explain_folder(path: Path) -> str | None:
    """Tell what a path is that is no checkpoint, and what to give instead.

    It goes by the names of files, and by what config.json and adapter_config.json say of the format;
    whether weights are complete is for `Checkpoint.open` to tell.

    Args:
        path: Where a checkpoint was expected.

    Returns:
        A message for a `RequestError`; None for a folder that may be a checkpoint.
    """
    try:
        if path.is_dir():
            return _explain_names(path, sorted(entry.name for entry in path.iterdir()))
        return _explain_file(path)
    except OSError as err:
        return f"{path} cannot be read: {err.strerror}; expected {_CHECKPOINT}"


def require_checkpoint(path: Path) -> None:
    """Refuse a path that is no checkpoint, before anything is read.

    Raises:
        RequestError: With what it is, see `explain_folder`.
    """
    wrong = explain_folder(path)
    if wrong is not None:
        raise RequestError(wrong)


def _explain_file(path: Path) -> str:
    from gemma_deploy.engine import ENGINE_FILE  # these import `Checkpoint`, which may ask us
    from gemma_deploy.manifest import MANIFEST_FILE

    if not path.exists():
        return f"{path} does not exist; expected {_CHECKPOINT}"
    weights = _foreign([path.name])
    if weights is not None:
        return f"{path} holds weights as {weights}: not read. {_instead(weights)}"
    parent = path.parent
    known = (CONFIG_FILE, MANIFEST_FILE, ENGINE_FILE)
    if any((parent / name).is_file() for name in known):
        return f"{path} is a file; give the folder that it lies in: {parent}"
    return f"{path} is a file; expected {_CHECKPOINT}"


def _explain_names(folder: Path, names: Sequence[str]) -> str | None:
    from gemma_deploy.engine import ENGINE_FILE
    from gemma_deploy.manifest import MANIFEST_FILE

    others = {
        MANIFEST_FILE: "a bundle: give the checkpoint that it was exported from",
        ENGINE_FILE: "an engine: give the checkpoint that its bundle was exported from",
        "model_index.json": f"a pipeline of diffusers, no language model: expected {_CHECKPOINT}",
    }
    for marker, kind in others.items():
        if marker in names:
            return f"{folder} has {marker}, it is {kind}"
    if "decode.onnx" in names:
        return (
            f"{folder} holds a bundle's graphs, and no {MANIFEST_FILE}: copy the bundle again, and "
            "whole. Where a checkpoint is wanted, give the one that it was exported from"
        )
    has_config = CONFIG_FILE in names
    if ADAPTER_FILE in names and not has_config:
        return _explain_adapter(folder)
    if has_config and any(name.endswith(".safetensors") for name in names):
        return _explain_mlx(folder)
    weights = _foreign(names)
    if weights is not None:
        return f"{folder} holds weights only as {weights}: not read. {_instead(weights)}"
    return None if has_config else _explain_missing_config(folder, names)


def _explain_adapter(folder: Path) -> str:
    base = _json(folder / ADAPTER_FILE).get("base_model_name_or_path")
    of = f" of {base[:200]}" if isinstance(base, str) and base else ""
    return (
        f"{folder} is an adapter{of} (it has {ADAPTER_FILE} and no {CONFIG_FILE}): merge it into its "
        "base model first (merge_and_unload and save_pretrained in PEFT), and give that folder"
    )


def _explain_mlx(folder: Path) -> str | None:
    quantization = _json(folder / CONFIG_FILE).get("quantization")
    if not isinstance(quantization, Mapping):
        return None
    return (
        f"{folder} is quantized by MLX (config.json has quantization): not read. Give the original "
        "float checkpoint, and quantize while exporting: --int8 or --int4"
    )


def _explain_missing_config(folder: Path, names: Sequence[str]) -> str:
    nested = next((x for pattern in _NESTED for x in sorted(folder.glob(pattern))), None)
    if nested is not None:
        found = f"the one in {nested.parent} was probably meant"
    elif any(name.endswith(".safetensors") for name in names):
        found = "it has weights only, and nothing that says of what model: add its config.json"
    else:
        found = f"it holds {', '.join(names[:3]) or 'nothing'}{', ...' if len(names) > 3 else ''}"
    return f"{folder} has no {CONFIG_FILE}; {found}. Expected {_CHECKPOINT}"


def _foreign(names: Sequence[str]) -> str | None:
    """Return the format that the names say weights are in, if it is one that is not read."""
    lowered = [name.lower() for name in names]
    return next(
        (
            weights
            for suffix, weights in _FOREIGN_WEIGHTS.items()
            if any(name.endswith(suffix) for name in lowered)
        ),
        None,
    )


def _instead(weights: str) -> str:
    remedy = f"Give {_CHECKPOINT}"
    if weights.startswith("pickle"):
        return f"{remedy} (transformers' save_pretrained converts it)"
    if weights.startswith("GGUF"):
        return f"{remedy}, the original that the file was made of; --int8 or --int4 quantizes it"
    return remedy


def _json(path: Path) -> Mapping[str, Any]:
    """Return a JSON object of a file; empty where it is something else: others report that."""
    try:
        return read_json(path, max_bytes=MAX_CONFIG_BYTES, error=RequestError, remedy="")
    except RequestError:
        return {}

"""Safetensors files of a checkpoint folder: which there are, and what their headers say.

The file format: https://github.com/huggingface/safetensors#format
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gemma_deploy.errors import CheckpointError
from gemma_deploy.json_files import open_regular, parse_json, read_json
from gemma_deploy.json_values import typed
from gemma_deploy.limits import MAX_DIM, MAX_DIMS, MAX_METADATA_BYTES
from gemma_deploy.quoting import shortened

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")
_SHARD: Final = re.compile(r"model-(?P<number>\d{1,6})-of-(?P<count>\d{1,6})\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights.

    Raises:
        CheckpointError: If there are none, only pickles, or an index that cannot be followed.
    """
    # The single file wins over an index, as in transformers.
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _shards(folder)
    names = sorted(path.name for path in folder.iterdir())
    shards = [match for name in names if (match := _SHARD.fullmatch(name))]
    if shards:
        return _all_shards(folder, shards)
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickle ({pickles[0]}), which runs arbitrary code when "
            "loaded and is refused. Expected model.safetensors: convert it with transformers' "
            "save_pretrained, or download the safetensors version"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f" (found {', '.join(others[:3])}: is one of them the model's?)" if others else ""
    raise CheckpointError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{found}: expected a folder in Hugging "
        "Face layout. Download the checkpoint again, with its *.safetensors files"
    )


def _all_shards(folder: Path, shards: Sequence[re.Match[str]]) -> list[Path]:
    """Return numbered shards that lie there without an index, if they are one whole set."""
    counts = {int(shard["count"]) for shard in shards}
    numbers = {int(shard["number"]) for shard in shards}
    if len(counts) > 1 or numbers != set(range(1, max(counts) + 1)):
        raise CheckpointError(
            f"{folder} holds shards without {INDEX_FILE}, and not one whole set of them: "
            f"{', '.join(shard[0] for shard in shards[:3])}{', ...' if len(shards) > 3 else ''} "
            f"({len(shards)} of {max(counts)}). Download the checkpoint again"
        )
    return [folder / shard[0] for shard in shards]


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    raw = read_json(
        index, max_bytes=MAX_METADATA_BYTES, error=CheckpointError, remedy="download it again"
    )
    try:
        names = sorted(set(typed(Mapping[str, str], raw.get("weight_map"), "weight_map").values()))
    except ValueError as err:
        raise CheckpointError(
            f"{index}: {err}. It maps the tensors' names to names of files; download it again"
        ) from err
    for name in names:
        # A shard is a file beside its index; anything else would let an index read foreign files.
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"{index} points to {name!r}, which is outside the checkpoint's folder: refused. "
                "Expected names of files beside the index"
            )
        if Path(name).suffix != ".safetensors":
            raise CheckpointError(
                f"{index} points to {name!r}; only *.safetensors shards are read. Pickle runs "
                "arbitrary code when loaded and is refused: convert the checkpoint to safetensors"
            )
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing, yet {INDEX_FILE} lists it ({len(names)} shards): "
                "download the checkpoint again"
            )
    return [folder / name for name in names]


def stored_header(file: Path) -> tuple[bytes, int]:
    """Return the JSON at the start of a safetensors file, as it is stored, and the file's size in bytes.

    Raises:
        CheckpointError: It cannot be read, or is longer than the file or than any header.
    """
    try:
        with open_regular(file) as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_bytes <= min(MAX_METADATA_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{file} ({file_bytes} bytes) is not a safetensors file or is cut off in its "
                    f"header (said to be {header_bytes} bytes): download it again"
                )
            return stream.read(header_bytes), file_bytes
    except OSError as err:
        raise CheckpointError(
            f"{file} cannot be read: {err.strerror or err}. Download it again"
        ) from err


def read_header(file: Path) -> dict[str, Any]:
    """Return the header's entries by tensor name, with offsets counted from the file's start.

    Raises:
        CheckpointError: If the header cannot be read, or the file is shorter than it says.
    """
    raw, file_bytes = stored_header(file)
    header = parse_json(
        raw, f"the safetensors header of {file}", error=CheckpointError, remedy="download it again"
    )
    header.pop("__metadata__", None)
    try:
        entries = typed(Mapping[str, _Entry], header, "the header")
        _check_contiguous([entry.data_offsets for entry in entries.values()])
    except ValueError as err:
        raise CheckpointError(
            f"{file} has an unreadable safetensors header: {err}. Download it again"
        ) from err
    start = 8 + len(raw)
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        header[name] = {
            "data_offsets": (begin + start, end + start),
            "shape": entry.shape,
            "dtype": entry.dtype,
        }
    expected_bytes = max((e["data_offsets"][1] for e in header.values()), default=0)
    if file_bytes < expected_bytes:
        raise CheckpointError(
            f"{file} is truncated: {file_bytes} bytes, expected {expected_bytes} by its header. "
            "Download it again"
        )
    return header


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        is_possible = all(0 <= size <= MAX_DIM for size in self.shape)
        if len(self.shape) > MAX_DIMS or not is_possible:
            raise ValueError(f"shape {shortened(self.shape)}, expected up to {MAX_DIMS} sizes")
        if len(self.data_offsets) != 2:
            raise ValueError(f"data_offsets {shortened(self.data_offsets)}, expected two offsets")


def _check_contiguous(offsets: Iterable[tuple[int, ...]]) -> None:
    """Require tensors one after the other, without overlaps and holes, as the format does."""
    end = 0
    for begin, next_end in sorted(offsets):
        if not begin == end <= next_end:
            raise ValueError(f"data_offsets [{begin}, {next_end}] where byte {end} comes next")
        end = next_end

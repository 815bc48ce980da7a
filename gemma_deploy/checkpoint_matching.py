"""Stored tensors held against those that a config calls for: `match_tensors`."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gemma_deploy.bitsandbytes_nf4 import PART_NAMES, STATE_SUFFIX, Nf4Matrix, nf4_matrix
from gemma_deploy.checkpoint_names import (
    EMBEDDING_WEIGHT,
    HEAD_WEIGHT,
    canonical_names,
    explain_replaced,
    explain_unused,
    harmless_kind,
    listed_names,
)
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import CheckpointError
from gemma_deploy.quoting import shortened
from gemma_deploy.safetensors_files import read_header, weight_files
from gemma_deploy.stored_tensor import FLOAT_BYTES, StoredTensor


@dataclass(slots=True, kw_only=True)
class MatchedTensors:
    """What a text model finds in a checkpoint.

    Attributes:
        tensors: By canonical names; those in NF4 as the float32 matrices that they stand for.
        nf4: Where the parts of those in NF4 are.
        unused: Stored names that were left out, by what they are.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    nf4: dict[str, Nf4Matrix] = field(default_factory=dict)
    unused: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_stored_tensors(folder: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return every stored tensor by its canonical name, and the prefixes of wrappers.

    Raises:
        CheckpointError: Files are missing or broken, or a tensor is stored twice.
    """
    entries = [
        (stored_name, entry, file)
        for file in weight_files(folder)
        for stored_name, entry in read_header(file).items()
    ]
    names, wrappers = canonical_names([stored_name for stored_name, *_ in entries])
    found: dict[str, StoredTensor] = {}
    for stored_name, entry, file in entries:
        name = names[stored_name]
        if name in found:
            first = found[name]
            raise CheckpointError(
                f"{stored_name} in {file} is there a second time (first as {first.stored_name} in "
                f"{first.file}): remove the folder's stale *.safetensors files"
            )
        begin, end = entry["data_offsets"]
        found[name] = StoredTensor(
            name=name,
            stored_name=stored_name,
            dtype=entry["dtype"],
            shape=entry["shape"],
            file=file,
            offset=begin,
            size_bytes=end - begin,
        )
    return found, wrappers


def match_tensors(
    found: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    config: GemmaConfig,
    folder: Path,
) -> MatchedTensors:
    """Find the tensors that a config calls for, and account for all others.

    A head that is stored beside a tied embedding is among them; whether the two are equal is for
    the caller to see.

    Args:
        found: Every stored tensor, by its canonical name.
        expected: Shapes of the text model's tensors, by canonical names.
        config: The text model's.
        folder: What errors name.

    Raises:
        CheckpointError: A tensor is missing or not as the config says, or one has no use.
    """
    found = dict(found)
    shapes = dict(expected)
    if config.tie_word_embeddings and HEAD_WEIGHT in found:
        if EMBEDDING_WEIGHT in found:
            shapes[HEAD_WEIGHT] = shapes[EMBEDDING_WEIGHT]
        else:
            # Tied, and saved under the other name: transformers reads it so, too.
            head = found.pop(HEAD_WEIGHT)
            found[EMBEDDING_WEIGHT] = dataclasses.replace(head, name=EMBEDDING_WEIGHT)
    matched, rest = MatchedTensors(), {}
    for name, info in found.items():
        if name in shapes or _is_nf4_part(name, found):
            continue
        kind = harmless_kind(name)
        if kind is None:
            rest[name] = info.stored_name
        else:
            matched.unused[kind] = (*matched.unused.get(kind, ()), info.stored_name)
    _refuse(folder, explain_replaced(rest))
    for name, shape in shapes.items():
        if name not in found:
            raise CheckpointError(_explain_missing(name, shape, found, rest, folder))
        info = found[name]
        if name + STATE_SUFFIX in found:
            matched.nf4[name] = nf4_matrix(name, shape, found)
            size_bytes = math.prod(shape) * FLOAT_BYTES["F32"]
            info = dataclasses.replace(info, dtype="F32", shape=shape, size_bytes=size_bytes)
        _check(info, shape)
        matched.tensors[name] = info
    _refuse(folder, explain_unused(rest, config))
    return matched


def _is_nf4_part(name: str, found: Mapping[str, StoredTensor]) -> bool:
    """Tell whether a tensor is a part of a matrix in bitsandbytes' NF4."""
    matrix, _, part = name.partition(".weight.")
    return part in PART_NAMES and f"{matrix}.weight{STATE_SUFFIX}" in found


def _refuse(folder: Path, explanation: str | None) -> None:
    if explanation is not None:
        raise CheckpointError(
            f"{folder} holds more than the text model of its config.json, which would be another "
            f"model without it: {explanation}"
        )


def _check(info: StoredTensor, shape: tuple[int, ...]) -> None:
    """Require of a tensor the shape that the config calls for, a float dtype, and as many bytes."""
    if info.shape != shape:
        raise CheckpointError(
            f"{info.stored_name} in {info.file} has shape {shortened(list(info.shape))}, expected "
            f"{list(shape)} by config.json: they belong to different models"
        )
    if info.dtype not in FLOAT_BYTES:
        raise CheckpointError(
            f"{info.stored_name} in {info.file} has dtype {info.dtype}, expected "
            f"{', '.join(FLOAT_BYTES)}: use the original float checkpoint"
        )
    expected_bytes = math.prod(shape) * FLOAT_BYTES[info.dtype]
    if info.size_bytes != expected_bytes:
        raise CheckpointError(
            f"{info.stored_name} in {info.file} takes {info.size_bytes} bytes, expected "
            f"{expected_bytes} for {info.dtype} {list(shape)}: the file is corrupt, download it again"
        )


def _explain_missing(
    name: str,
    shape: tuple[int, ...],
    found: Mapping[str, StoredTensor],
    rest: Mapping[str, str],
    folder: Path,
) -> str:
    """Return what is missing, and what was found instead."""
    if name == HEAD_WEIGHT:
        return (
            f"{folder} lacks {HEAD_WEIGHT}, and config.json says that the head is not tied to the "
            "embedding (tie_word_embeddings is false): transformers would draw a random head. Set it to "
            "true if the model was trained with a tied head; otherwise download the checkpoint again"
        )
    # Those without use first: one of them may be what is missing, under another name.
    names = [*sorted(rest.values()), *sorted(info.stored_name for info in found.values())]
    some = f": {listed_names(names)}" if names else ""
    return (
        f"{folder} lacks the tensor {name} {list(shape)} that its config.json calls for (it "
        f"holds {len(found)} tensors{some}): the checkpoint is incomplete, or belongs to another "
        "config.json"
    )

"""A Hugging Face checkpoint folder, opened by its headers: `Checkpoint`.

Nothing is mapped and nothing is read ahead: opening a checkpoint reads `config.json` and the headers
of its `*.safetensors` files, and weights are read row by row into memory that the caller owns. The
file format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gemma_deploy.bitsandbytes_nf4 import STATE_SUFFIX, Nf4Matrix, nf4_matrix
from gemma_deploy.checkpoint_names import (
    canonical_names,
    explain_replaced,
    explain_unused,
    harmless_kind,
)
from gemma_deploy.config import GemmaConfig, read_config
from gemma_deploy.errors import CheckpointError, ConfigError, warn
from gemma_deploy.graph_spec import DType
from gemma_deploy.quoting import shortened
from gemma_deploy.safetensors_files import read_header, weight_files

HEAD_WEIGHT: Final = "lm_head.weight"
EMBEDDING_WEIGHT: Final = "model.embed_tokens.weight"
DTYPE_BYTES: Final[Mapping[str, int]] = MappingProxyType({"F32": 4, "F16": 2, "BF16": 2})
DTYPE_NAMES: Final[Mapping[str, DType]] = MappingProxyType(
    {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)
"""The float dtypes of checkpoints: what safetensors calls them, and what everything else does."""

ROW_BLOCK_BYTES: Final = 64 * 1024 * 1024

_NUMPY_DTYPES: Final[Mapping[str, npt.DTypeLike]] = MappingProxyType(
    {"F32": np.float32, "F16": np.float16}
)
_GENERATORS: Final = ("ForCausalLM", "ForConditionalGeneration")
# What PEFT and MLX call an adapter's weights.
_ADAPTER_WEIGHTS: Final = re.compile(r"adapter_model\.\w+|adapters\.(safetensors|npz)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor of a checkpoint is stored.

    Attributes:
        name: Canonical name, e.g. `model.layers.0.mlp.up_proj.weight`.
        stored_name: Its name in the file.
        dtype: `F32`, `F16` or `BF16`, as safetensors spells it.
        shape: Dimensions; matrices are [out, in].
        file: The safetensors file that holds it.
        offset: Its first byte, counted from the file's start.
        size_bytes: Its length.
        nf4: Of a matrix in bitsandbytes' NF4, where its parts are stored. It is read like any other,
            as what the codes stand for: dtype, shape and sizes are those of that float32 matrix.
    """

    name: str
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    size_bytes: int
    nf4: Nf4Matrix | None = None

    @property
    def num_rows(self) -> int:
        """Length of the first dimension."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Size of one row (an index of the first dimension) in bytes."""
        return self.size_bytes // self.num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A Gemma checkpoint whose config and tensors agree with each other.

    Every stored tensor is the text model's, or known to be harmless to leave out.

    Attributes:
        folder: The folder it was opened from.
        config: Parsed `config.json`; the head is not tied where another one is stored.
        architectures: Names of the classes that it was saved from, by `config.json`.
        tensors: The text model's tensors under canonical names; `lm_head.weight` only when the
            head is not tied to the embedding.
        unused: What was left out: stored names by what they are.
    """

    folder: Path
    config: GemmaConfig
    architectures: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]
    unused: Mapping[str, tuple[str, ...]]

    @property
    def nf4_block_sizes(self) -> Mapping[str, int]:
        """Block size of each matrix that bitsandbytes quantized to NF4; empty where none is."""
        return {name: x.nf4.block_size for name, x in self.tensors.items() if x.nf4 is not None}

    @classmethod
    def open(cls, folder: Path | str) -> "Checkpoint":
        """Read the config and every tensor's place, and hold one against the other.

        The tensors decide where both speak of the same thing: a stored head that differs from the
        embedding is the head, whatever `tie_word_embeddings` says, as in transformers 5. No weights
        are read but to compare these two. Prefixes of wrappers (`_orig_mod.`, `module.`,
        `base_model.model.`) are taken off. Both are said in a `GemmaDeployWarning`.

        Args:
            folder: Folder in Hugging Face layout: `config.json` and `model.safetensors`, or
                shards of it, with or without `model.safetensors.index.json`.

        Raises:
            CheckpointError: If weights are missing, truncated, of the wrong shape or dtype, there
                only as pickle, or more than the text model has a use for; or if an adapter lies in
                the folder.
            ConfigError: If `config.json` is missing or not a Gemma config.
        """
        folder = Path(folder)
        _refuse_adapter(folder)
        raw = read_config(folder)
        config = GemmaConfig.from_dict(raw)
        found, wrappers = _stored_tensors(folder)
        if wrappers:
            warn(
                f"{folder}: {' and '.join(wrappers)}, which a wrapper put into the names of tensors, "
                "was taken off"
            )
        return _matched(
            cls(
                folder=folder,
                config=config,
                architectures=_architectures(raw),
                tensors=MappingProxyType(found),
                unused=MappingProxyType({}),
            )
        )

    def require_text_generator(self) -> None:
        """Refuse a checkpoint that was saved from a class that generates no text.

        Raises:
            CheckpointError: If `architectures` names other classes than `*ForCausalLM` and
                `*ForConditionalGeneration`.
        """
        if self.architectures and not any(x.endswith(_GENERATORS) for x in self.architectures):
            raise CheckpointError(
                f"{self.folder} was saved from {', '.join(self.architectures)}, which generates no "
                f"text; expected {' or '.join(f'*{x}' for x in _GENERATORS)} (architectures in "
                "config.json). Use the language model that it was made from"
            )

    def read_rows(self, name: str, start: int, stop: int, into: memoryview) -> None:
        """Read rows [start, stop) of a tensor into memory of the caller, as stored (NF4: as float32).

        The read is explicit (no mapping), so the process holds these rows and nothing else.

        Args:
            name: Canonical tensor name.
            start: First row.
            stop: Row after the last.
            into: Writable, contiguous, exactly (stop - start) * row_bytes long; of any item format.

        Raises:
            CheckpointError: If the file ends early or cannot be read (it changed since it was
                opened).
        """
        info = self.tensors[name]
        target = into.cast("B") if into.format != "B" or into.ndim != 1 else into
        expected_bytes = (stop - start) * info.row_bytes
        if not 0 <= start <= stop <= info.num_rows or len(target) != expected_bytes:
            raise ValueError(
                f"rows {start}:{stop} of {name} {list(info.shape)} are {expected_bytes} bytes; "
                f"the buffer has {len(target)}"
            )
        if info.nf4 is not None:
            target[:] = info.nf4.rows(start, stop, _read_bytes).data.cast("B")
        else:
            _read_into(info, start * info.row_bytes, target)

    def float_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Return rows [start, stop) of a tensor, widened to float32.

        Raises:
            CheckpointError: As `read_rows`.
        """
        info = self.tensors[name]
        raw = np.empty((stop - start) * info.row_bytes, np.uint8)
        self.read_rows(name, start, stop, raw.data)
        if info.dtype == "BF16":
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view(_NUMPY_DTYPES[info.dtype]).astype(np.float32, copy=False)
        return values.reshape(stop - start, *info.shape[1:])

    def row_blocks(self, name: str, max_bytes: int = ROW_BLOCK_BYTES) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of successive blocks of rows of at most `max_bytes` each.

        A single row longer than that is a block by itself.
        """
        info = self.tensors[name]
        step = max(1, max_bytes // info.row_bytes)
        for start in range(0, info.num_rows, step):
            yield start, min(start + step, info.num_rows)


def expected_tensors(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor a checkpoint of this config holds, by canonical name."""
    hidden, width = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING_WEIGHT: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes |= {f"{prefix}.self_attn.{k}": v for k, v in _attention_tensors(config).items()}
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        if config.has_post_norms:
            shapes[f"{prefix}.pre_feedforward_layernorm.weight"] = (hidden,)
            shapes[f"{prefix}.post_feedforward_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, width)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes[HEAD_WEIGHT] = (config.vocab_size, hidden)
    return shapes


def _attention_tensors(config: GemmaConfig) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for name, out_size, in_size in (
        ("q_proj", q_width, hidden),
        ("k_proj", kv_width, hidden),
        ("v_proj", kv_width, hidden),
        ("o_proj", hidden, q_width),
    ):
        shapes[f"{name}.weight"] = (out_size, in_size)
        if config.attention_bias:
            shapes[f"{name}.bias"] = (out_size,)
    if config.has_qk_norm:
        shapes["q_norm.weight"] = (config.head_dim,)
        shapes["k_norm.weight"] = (config.head_dim,)
    return shapes


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter in it: the base alone would be the model before training."""
    found = sorted(
        path.name
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name == "adapter_config.json" or _ADAPTER_WEIGHTS.fullmatch(path.name)
    )
    if found:
        raise CheckpointError(
            f"{folder} holds an adapter ({', '.join(found)}), which is not applied: merge it into its "
            "base model (merge_and_unload and save_pretrained in PEFT) and give that folder, or move "
            "the adapter's files away to have the base model alone"
        )


def _architectures(raw: Mapping[str, Any]) -> tuple[str, ...]:
    named = raw.get("architectures") or ()
    if not isinstance(named, list | tuple) or not all(isinstance(x, str) for x in named):
        raise ConfigError(
            f"architectures is {shortened(named)}, expected a list of class names: correct config.json"
        )
    return tuple(named)


def _stored_tensors(folder: Path) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Return every stored tensor by its canonical name, and the prefixes of wrappers."""
    entries = [
        (stored_name, entry, file)
        for file in weight_files(folder)
        for stored_name, entry in read_header(file).items()
    ]
    names, wrappers = canonical_names({stored_name for stored_name, *_ in entries})
    found: dict[str, TensorInfo] = {}
    for stored_name, entry, file in entries:
        name = names[stored_name]
        if name in found:
            first = found[name]
            raise CheckpointError(
                f"{stored_name} in {file} is there a second time (first as {first.stored_name} in "
                f"{first.file}): remove the folder's stale *.safetensors files"
            )
        begin, end = entry["data_offsets"]
        found[name] = TensorInfo(
            name=name,
            stored_name=stored_name,
            dtype=entry["dtype"],
            shape=entry["shape"],
            file=file,
            offset=begin,
            size_bytes=end - begin,
        )
    return found, wrappers


def _matched(stored: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the tensors that its config calls for, out of all that are stored.

    Raises:
        CheckpointError: If any is missing or not as the config says, or one has no use.
    """
    found = dict(stored.tensors)
    if stored.config.tie_word_embeddings and EMBEDDING_WEIGHT not in found and HEAD_WEIGHT in found:
        # Tied, and saved under the other name: transformers reads it so, too.
        found[EMBEDDING_WEIGHT] = dataclasses.replace(found.pop(HEAD_WEIGHT), name=EMBEDDING_WEIGHT)
    expected = expected_tensors(stored.config)
    rest = {
        name: info.stored_name
        for name, info in found.items()
        if name not in expected and not _is_nf4_part(name, found)
    }
    unused: dict[str, tuple[str, ...]] = {}
    for name in list(rest):
        kind = harmless_kind(name)
        if kind is not None:
            unused[kind] = (*unused.get(kind, ()), rest.pop(name))
    has_head = rest.pop(HEAD_WEIGHT, None) is not None
    _refuse(stored.folder, explain_replaced(rest))
    if has_head:
        expected[HEAD_WEIGHT] = expected[EMBEDDING_WEIGHT]
    tensors = {name: _checked(name, shape, found, stored) for name, shape in expected.items()}
    _refuse(stored.folder, explain_unused(rest, stored.config))
    matched = dataclasses.replace(
        stored, tensors=MappingProxyType(tensors), unused=MappingProxyType(unused)
    )
    return _with_its_head(matched) if has_head else matched


def _refuse(folder: Path, explanation: str | None) -> None:
    if explanation is not None:
        raise CheckpointError(
            f"{folder} holds more than the text model of its config.json, which would be another "
            f"model without it: {explanation}"
        )


def _is_nf4_part(name: str, found: Mapping[str, TensorInfo]) -> bool:
    """Tell whether a tensor is a part of a matrix in bitsandbytes' NF4."""
    matrix = name.partition(".weight.")[0] + ".weight"
    return matrix != name and matrix + STATE_SUFFIX in found


def _with_its_head(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that says it is tied, with the head that is stored beside the embedding.

    A head that is equal to the embedding is left out.
    """
    tensors = dict(checkpoint.tensors)
    if _are_equal(checkpoint, HEAD_WEIGHT, EMBEDDING_WEIGHT):
        head = tensors.pop(HEAD_WEIGHT).stored_name
        unused = {**checkpoint.unused, "of a head that is equal to the embedding": (head,)}
        return dataclasses.replace(
            checkpoint, tensors=MappingProxyType(tensors), unused=MappingProxyType(unused)
        )
    warn(
        f"{checkpoint.folder}: config.json says that the head is tied to the embedding, and a "
        f"{tensors[HEAD_WEIGHT].stored_name} is stored that differs from it: that is the head "
        "(tie_word_embeddings is taken as false)"
    )
    return dataclasses.replace(
        checkpoint, config=dataclasses.replace(checkpoint.config, tie_word_embeddings=False)
    )


def _are_equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Compare two tensors of one shape, block by block, by their values."""
    num_rows = checkpoint.tensors[one].num_rows
    step = max(1, ROW_BLOCK_BYTES // max(checkpoint.tensors[x].row_bytes for x in (one, other)))
    return all(
        np.array_equal(
            checkpoint.float_rows(one, start, min(start + step, num_rows)),
            checkpoint.float_rows(other, start, min(start + step, num_rows)),
        )
        for start in range(0, num_rows, step)
    )


def _checked(
    name: str, shape: tuple[int, ...], found: Mapping[str, TensorInfo], stored: Checkpoint
) -> TensorInfo:
    """Return a tensor that the config calls for."""
    info = found.get(name)
    if info is None:
        raise CheckpointError(_explain_missing(name, shape, stored))
    if name + STATE_SUFFIX in found:
        info = _nf4_info(info, nf4_matrix(name, shape, found, _read_bytes))
    if info.shape != shape:
        raise CheckpointError(
            f"{info.stored_name} in {info.file} has shape {shortened(list(info.shape))}, expected "
            f"{list(shape)} by config.json: they belong to different models"
        )
    if info.dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{info.stored_name} in {info.file} has dtype {info.dtype}, expected "
            f"{', '.join(DTYPE_BYTES)}: use the original float checkpoint"
        )
    expected_bytes = math.prod(shape) * DTYPE_BYTES[info.dtype]
    if info.size_bytes != expected_bytes:
        raise CheckpointError(
            f"{info.stored_name} in {info.file} takes {info.size_bytes} bytes, expected "
            f"{expected_bytes} for {info.dtype} {list(shape)}: the file is corrupt, download it again"
        )
    return info


def _explain_missing(name: str, shape: tuple[int, ...], stored: Checkpoint) -> str:
    """Return what is missing, and what was found instead."""
    if name == HEAD_WEIGHT:
        return (
            f"{stored.folder} lacks {HEAD_WEIGHT}, and config.json says that the head is not tied to the "
            "embedding (tie_word_embeddings is false): transformers would draw a random head. Set it to "
            "true if the model was trained with a tied head; otherwise download the checkpoint again"
        )
    names = sorted(info.stored_name for info in stored.tensors.values())
    some = f": {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""
    return (
        f"{stored.folder} lacks the tensor {name} {list(shape)} that its config.json calls for (it "
        f"holds {len(names)} tensors{some}): the checkpoint is incomplete, or belongs to another "
        "config.json"
    )


def _nf4_info(codes: TensorInfo, matrix: Nf4Matrix) -> TensorInfo:
    return dataclasses.replace(
        codes,
        dtype="F32",
        shape=matrix.shape,
        size_bytes=math.prod(matrix.shape) * DTYPE_BYTES["F32"],
        nf4=matrix,
    )


def _read_bytes(info: TensorInfo, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a tensor as stored."""
    raw = bytearray(stop - start)
    _read_into(info, start, memoryview(raw))
    return bytes(raw)


def _read_into(info: TensorInfo, start: int, target: memoryview) -> None:
    """Read bytes of a tensor from `start` on, as stored."""
    try:
        with info.file.open("rb", buffering=0) as stream:
            stream.seek(info.offset + start)
            _read_fully(stream, target)
    except (OSError, EOFError) as err:
        raise CheckpointError(
            f"{info.file} could not be read to the end of {info.name}: {err}. It changed since it "
            "was opened, or its disk fails: copy or download the checkpoint again"
        ) from err


def _read_fully(stream: Any, target: memoryview) -> None:
    """Fill `target`; an unbuffered read may return less than asked for."""
    while target:
        count = stream.readinto(target)
        if not count:
            raise EOFError(f"the file ends {len(target)} bytes early")
        target = target[count:]

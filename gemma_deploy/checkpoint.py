"""A Hugging Face checkpoint folder, opened by its headers: `Checkpoint`.

Nothing is mapped and nothing is read ahead: opening a checkpoint reads `config.json` and the headers
of its `*.safetensors` files, and weights are read row by row into memory that the caller owns. The
file format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from gemma_deploy.bitsandbytes_nf4 import STATE_SUFFIX, Nf4Matrix, nf4_matrix
from gemma_deploy.config import GemmaConfig
from gemma_deploy.errors import CheckpointError
from gemma_deploy.graph_spec import DType
from gemma_deploy.safetensors_files import read_header, weight_files

HEAD_WEIGHT: Final = "lm_head.weight"
EMBEDDING_WEIGHT: Final = "model.embed_tokens.weight"
DTYPE_BYTES: Final[Mapping[str, int]] = MappingProxyType({"F32": 4, "F16": 2, "BF16": 2})
DTYPE_NAMES: Final[Mapping[str, DType]] = MappingProxyType(
    {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)
"""The float dtypes of checkpoints: what safetensors calls them, and what everything else does."""

ROW_BLOCK_BYTES: Final = 64 * 1024 * 1024

# Where the text model of each layout lives, longest first: `gemma3` as transformers >= 4.52 writes
# it, `gemma3` as on the hub, `gemma3` without its head, then the text model, with and without head.
_PREFIXES: Final = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model."),
    ("model.", "model."),
    ("lm_head.", "lm_head."),
    ("", "model."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor of a checkpoint is stored.

    Attributes:
        name: Canonical name, e.g. `model.layers.0.mlp.up_proj.weight`.
        dtype: `F32`, `F16` or `BF16`, as safetensors spells it.
        shape: Dimensions; matrices are [out, in].
        file: The safetensors file that holds it.
        offset: Its first byte, counted from the file's start.
        size_bytes: Its length.
        nf4: Of a matrix in bitsandbytes' NF4, where its parts are stored. It is read like any other,
            as what the codes stand for: dtype, shape and sizes are those of that float32 matrix.
    """

    name: str
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
    """A Gemma checkpoint whose config and headers were read and agree with each other.

    Attributes:
        folder: The folder it was opened from.
        config: Parsed `config.json`.
        tensors: The text model's tensors under canonical names; `lm_head.weight` only when the
            head is not tied to the embedding.
    """

    folder: Path
    config: GemmaConfig
    tensors: Mapping[str, TensorInfo]

    @property
    def nf4_block_sizes(self) -> Mapping[str, int]:
        """Block size of each matrix that bitsandbytes quantized to NF4; empty where none is."""
        return {name: x.nf4.block_size for name, x in self.tensors.items() if x.nf4 is not None}

    @classmethod
    def open(cls, folder: Path | str) -> "Checkpoint":
        """Read the config and every tensor's place; no weights are read.

        Args:
            folder: Folder in Hugging Face layout: `config.json` and `model.safetensors`, or
                `model.safetensors.index.json` with its shards.

        Raises:
            CheckpointError: If weights are missing, truncated, of the wrong shape or dtype, or
                there only as pickle.
            ConfigError: If `config.json` is missing or not a Gemma config.
        """
        folder = Path(folder)
        config = GemmaConfig.from_file(folder / "config.json")
        found: dict[str, TensorInfo] = {}
        for file in weight_files(folder):
            for stored_name, entry in read_header(file).items():
                name = _canonical(stored_name)
                if name in found:
                    raise CheckpointError(
                        f"{stored_name} in {file} is there a second time (first in "
                        f"{found[name].file}): remove the folder's stale *.safetensors files"
                    )
                found[name] = _tensor_info(name, entry, file)
        return cls(folder=folder, config=config, tensors=_checked(found, config, folder))

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


def _canonical(stored_name: str) -> str:
    return next(
        canonical + stored_name.removeprefix(prefix)
        for prefix, canonical in _PREFIXES
        if stored_name.startswith(prefix)
    )


def _tensor_info(name: str, entry: Mapping[str, Any], file: Path) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(
        name=name,
        dtype=entry["dtype"],
        shape=entry["shape"],
        file=file,
        offset=begin,
        size_bytes=end - begin,
    )


def _checked(
    found: Mapping[str, TensorInfo], config: GemmaConfig, folder: Path
) -> Mapping[str, TensorInfo]:
    """Return the tensors that the config calls for; vision towers and the like are left out."""
    tensors: dict[str, TensorInfo] = {}
    for name, shape in expected_tensors(config).items():
        info = found.get(name)
        if info is not None and name + STATE_SUFFIX in found:
            info = _nf4_info(info, nf4_matrix(name, shape, found, _read_bytes))
        if info is None:
            raise CheckpointError(
                f"{folder} lacks the tensor {name} {list(shape)} that its config.json calls for: "
                "the checkpoint is incomplete, or belongs to another config.json"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{name} in {info.file} has shape {list(info.shape)}, expected {list(shape)} by "
                "config.json: they belong to different models"
            )
        if info.dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{name} in {info.file} has dtype {info.dtype}, expected {', '.join(DTYPE_BYTES)}: "
                "use the original float checkpoint"
            )
        expected_bytes = math.prod(shape) * DTYPE_BYTES[info.dtype]
        if info.size_bytes != expected_bytes:
            raise CheckpointError(
                f"{name} in {info.file} takes {info.size_bytes} bytes, expected {expected_bytes} "
                f"for {info.dtype} {list(shape)}: the file is corrupt, download it again"
            )
        tensors[name] = info
    return MappingProxyType(tensors)


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

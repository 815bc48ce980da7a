"""A Hugging Face checkpoint folder, opened by its headers: `Checkpoint`.

Nothing is mapped and nothing is read ahead: opening a checkpoint reads `config.json` and the headers
of its `*.safetensors` files, and weights are read row by row into memory that the caller owns. The
file format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from gemma_deploy.bitsandbytes_nf4 import Nf4Matrix
from gemma_deploy.checkpoint_files import ADAPTER_FILE, checkpoint_snapshot
from gemma_deploy.checkpoint_matching import match_tensors, read_stored_tensors
from gemma_deploy.checkpoint_names import EMBEDDING_WEIGHT, HEAD_WEIGHT, listed_names
from gemma_deploy.config import GemmaConfig, read_config
from gemma_deploy.errors import CheckpointError, ConfigError, warn
from gemma_deploy.file_identity import Snapshot
from gemma_deploy.graph_spec import DType
from gemma_deploy.quoting import shortened
from gemma_deploy.stored_tensor import Floats, StoredTensor, widened

DTYPE_NAMES: Final[Mapping[str, DType]] = MappingProxyType(
    {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)
"""The float dtypes of checkpoints: what safetensors calls them, and what everything else does."""

ROW_BLOCK_BYTES: Final = 64 * 1024 * 1024

_GENERATORS: Final = ("ForCausalLM", "ForConditionalGeneration")
# What PEFT, MLX, torchtune, diffusers and llama.cpp call an adapter's weights.
_ADAPTER_WEIGHTS: Final = re.compile(
    r"(adapter_model.*|adapters?(_weights|_\d+)?|.*lora.*)\.(safetensors|bin|pt|npz|gguf|index\.json)"
)


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
        nf4: Those that bitsandbytes quantized to NF4. They are read like any others, as what the
            codes stand for: in `tensors` dtype, shape and sizes are those of that float32 matrix.
        unused: What was left out: stored names by what they are.
        snapshot: What its files were when it was opened.
    """

    folder: Path
    config: GemmaConfig
    architectures: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]
    nf4: Mapping[str, Nf4Matrix]
    unused: Mapping[str, tuple[str, ...]]
    snapshot: Snapshot = field(default_factory=Snapshot, repr=False, compare=False)

    @property
    def nf4_block_sizes(self) -> Mapping[str, int]:
        """Block size of each matrix that bitsandbytes quantized to NF4; empty where none is."""
        return {name: matrix.block_size for name, matrix in self.nf4.items()}

    @classmethod
    def open(cls, folder: Path | str) -> "Checkpoint":
        """Read the config and every tensor's place, and hold one against the other.

        The tensors decide where both speak of the same thing: a stored head that differs from the
        embedding is the head, whatever `tie_word_embeddings` says, as in transformers 5. No weights
        are read but to compare these two. Prefixes of wrappers (`_orig_mod.`, `module.`,
        `base_model.model.`) are taken off. Both are said in a `GemmaDeployWarning`, and so are
        `*.safetensors` files that are not read because no index lists them.

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
        snapshot = checkpoint_snapshot(folder)
        raw = read_config(folder)
        config = GemmaConfig.from_dict(raw)
        found, wrappers = read_stored_tensors(folder)
        if wrappers:
            warn(
                f"{folder}: {' and '.join(wrappers)}, which a wrapper put into the names of tensors, "
                "was taken off"
            )
        _name_unread_files(folder, {info.file for info in found.values()})
        matched = match_tensors(found, expected_tensors(config), config, folder)
        checkpoint = cls(
            folder=folder,
            config=config,
            architectures=_architectures(raw),
            tensors=MappingProxyType(matched.tensors),
            nf4=MappingProxyType(matched.nf4),
            unused=MappingProxyType(matched.unused),
            snapshot=snapshot,
        )
        has_second_head = config.tie_word_embeddings and HEAD_WEIGHT in matched.tensors
        return _with_its_head(checkpoint) if has_second_head else checkpoint

    def check_unchanged(self, doing: str) -> None:
        """Make sure that all that was read since `open` was read of one checkpoint.

        Args:
            doing: What it was read for, for the message.

        Raises:
            CheckpointError: The folder or one of its files was replaced or changed.
        """
        self.snapshot.check(CheckpointError, doing)

    def require_text_generator(self) -> None:
        """Refuse a checkpoint that was saved from a class that generates no text.

        Raises:
            CheckpointError: If `architectures` names other classes than `*ForCausalLM` and
                `*ForConditionalGeneration`.
        """
        if self.architectures and not any(x.endswith(_GENERATORS) for x in self.architectures):
            raise CheckpointError(
                f"{self.folder} was saved from {listed_names(self.architectures)}, which generates no "
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
        if name in self.nf4:
            target[:] = self.nf4[name].rows(start, stop).data.cast("B")
        else:
            info.read_into(start * info.row_bytes, target)

    def float_rows(self, name: str, start: int, stop: int) -> Floats:
        """Return rows [start, stop) of a tensor, widened to float32.

        Raises:
            CheckpointError: As `read_rows`.
        """
        info = self.tensors[name]
        raw = bytearray((stop - start) * info.row_bytes)
        self.read_rows(name, start, stop, memoryview(raw))
        return widened(raw, info.dtype).reshape(stop - start, *info.shape[1:])

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
        if path.name == ADAPTER_FILE or _ADAPTER_WEIGHTS.fullmatch(path.name)
    )
    if found:
        raise CheckpointError(
            f"{folder} holds an adapter ({', '.join(found)}), which is not applied: merge it into its "
            "base model (merge_and_unload and save_pretrained in PEFT) and give that folder, or move "
            "the adapter's files away to have the base model alone"
        )


def _name_unread_files(folder: Path, read: Collection[Path]) -> None:
    names = sorted(path.name for path in set(folder.glob("*.safetensors")) - set(read))
    if names and read:
        more = ", ..." if len(names) > 3 else ""
        warn(
            f"{folder} also holds {', '.join(names[:3])}{more}, which is not read: the weights are those "
            f"of {', '.join(sorted(path.name for path in read)[:3])}"
        )


def _architectures(raw: Mapping[str, Any]) -> tuple[str, ...]:
    named = raw.get("architectures") or ()
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list | tuple) or not all(isinstance(x, str) for x in named):
        raise ConfigError(
            f"architectures is {shortened(named)}, expected a list of class names: correct config.json"
        )
    return tuple(named)


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

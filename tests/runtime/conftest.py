"""Models with tokenizers to generate with: real tiny ones, engines of them really built with TensorRT
for RTX, without a GPU, and a session that follows a script."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import array_api_compat.numpy as array_api_numpy
import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

from gemma_deploy.bundle import Bundle
from gemma_deploy.config import GemmaConfig
from gemma_deploy.engine import EngineFolder
from gemma_deploy.exporters.engine import BuildOptions, build_engine, pack_engine
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession
from gemma_deploy.runtime.sessions.session import SessionLimits, StepLogits
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.text_generator import TextGenerator
from gemma_deploy.tokenizer import GemmaTokenizer

VOCAB_SIZE = 512
ENGINE_MAX_SEQ_LEN = 96
_TEXT = """The for statement is used to iterate over the elements of a sequence, such as a string, a
tuple or a list. The while statement is used for repeated execution as long as an expression is true.
Names refer to objects. Größe, naïve, 日本語: text is Unicode.""".splitlines()


class Folders(Protocol):
    """Gives the folder of a model by its name in `TINY_MODELS`; made on first use, not to be changed."""

    def __call__(self, name: str) -> Path: ...


class Sessions(Protocol):
    """Loads a bundle on the CPU with one thread; sessions are shared."""

    def __call__(self, name: str, *, use_decode_graph: bool = False) -> OnnxRuntimeSession: ...


@pytest.fixture(scope="session")
def text_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Folders:
    """Return tiny checkpoints that have a tokenizer and a generation_config.json."""
    tokenizer = _train_tokenizer()
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp("text") / name
            shutil.copytree(tiny_checkpoint(name), folder)
            tokenizer.save(str(folder / "tokenizer.json"))
            names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
            settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, **names}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            ids = {"bos_token_id": 2, "eos_token_id": [1, 7], "pad_token_id": 0}
            (folder / "generation_config.json").write_text(json.dumps(ids))
            folders[name] = folder
        return folders[name]

    return get


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory, text_checkpoint: Folders) -> Folders:
    """Return float32 bundles of `text_checkpoint`."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("bundles") / name
            export_checkpoint(text_checkpoint(name), folders[name])
        return folders[name]

    return get


@pytest.fixture(scope="session")
def onnxruntime_session(text_bundle: Folders) -> Sessions:
    """Return sessions of `text_bundle`."""
    sessions: dict[tuple[str, bool], OnnxRuntimeSession] = {}

    def get(name: str, *, use_decode_graph: bool = False) -> OnnxRuntimeSession:
        key = name, use_decode_graph
        if key not in sessions:
            sessions[key] = OnnxRuntimeSession(
                Bundle.open(text_bundle(name)),
                device=Device(kind="cpu"),
                threads=1,
                use_decode_graph=use_decode_graph,
            )
        return sessions[key]

    return get


class Engines(Protocol):
    """Builds an engine for compute capability 8.9 on first use, in a bundle of its own."""

    def __call__(self, name: str = "gemma1", **options: Any) -> EngineFolder: ...


@pytest.fixture(scope="session")
def text_engine(tmp_path_factory: pytest.TempPathFactory, text_checkpoint: Any) -> Engines:
    """Return `text_engine(name="gemma1", **options) -> EngineFolder` of `text_checkpoint` in float16."""
    engines: dict[Any, EngineFolder] = {}

    def get(name: str = "gemma1", **options: Any) -> EngineFolder:
        key = name, *sorted(options.items())
        if key not in engines:
            folder = tmp_path_factory.mktemp("engine") / "bundle"
            bundle = export_checkpoint(text_checkpoint(name), folder, dtype="float16")
            given = {"compute_capabilities": ("8.9",), "max_batch_size": 4, **options}
            engines[key] = build_engine(
                bundle,
                BuildOptions(flavour="tensorrt-rtx", max_seq_len=ENGINE_MAX_SEQ_LEN, **given),
            ).engine
        return engines[key]

    return get


@pytest.fixture(scope="session")
def engine_bundle(text_engine: Engines) -> Bundle:
    """Return a bundle with one engine; do not change it."""
    return Bundle.open(text_engine().folder.parent.parent)


@pytest.fixture(scope="session")
def packed_engine(tmp_path_factory: pytest.TempPathFactory, engine_bundle: Bundle) -> Path:
    """Return the folder of the engine of `engine_bundle`, packed."""
    folder = tmp_path_factory.mktemp("packed") / "engine"
    pack_engine(engine_bundle, "tensorrt-rtx", folder)
    return folder


@dataclass(frozen=True, eq=False)
class ScriptedCache:
    """Remembers the tokens of each row; rows share memory as real caches do."""

    tokens: npt.NDArray[np.int64]

    @property
    def batch_size(self) -> int:
        return len(self.tokens)

    @property
    def max_seq_len(self) -> int:
        return int(self.tokens.shape[1])

    def rows(self, start: int, stop: int) -> "ScriptedCache":
        return ScriptedCache(self.tokens[start:stop])


@dataclass
class ScriptedSession:
    """Says the sum of the row's tokens so far plus one, modulo V: any misplaced token changes it.

    Its logits are in the same memory at every step, which the protocol allows.
    """

    vocab_size: int = 16
    steps: list[tuple[int, int]] = field(default_factory=list)
    logits_at_step: dict[int, float] = field(default_factory=dict)
    on_step: Callable[[int], object] = lambda _: None
    xp: Any = array_api_numpy
    device: Device = field(default_factory=lambda: Device(kind="cpu"))
    is_closed: bool = False
    limits: SessionLimits = field(default_factory=SessionLimits)
    memory: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def config(self) -> GemmaConfig:
        return GemmaConfig(
            vocab_size=self.vocab_size, num_hidden_layers=1, max_position_embeddings=64
        )

    def new_cache(self, batch_size: int, max_seq_len: int) -> ScriptedCache:
        return ScriptedCache(np.full((batch_size, max_seq_len), -1, np.int64))

    def step(
        self,
        input_ids: npt.NDArray[np.int64],
        input_pos: npt.NDArray[np.int64],
        logits_index: npt.NDArray[np.int64],
        cache: Any,
        *,
        num_candidates: int | None = None,  # noqa: ARG002 - the protocol's; more may be given
    ) -> StepLogits:
        rows, length = input_ids.shape
        assert input_pos.shape == (rows,)
        assert cache.tokens.shape[0] == rows
        assert all(array.dtype == np.int64 for array in (input_ids, input_pos, logits_index))
        self.on_step(len(self.steps))
        shape = rows, logits_index.shape[1], self.vocab_size
        if self.memory.size < np.prod(shape):
            self.memory = np.empty(np.prod(shape), np.float32)
        logits = self.memory[: np.prod(shape)].reshape(shape)
        logits[:] = 0
        for row, start in enumerate(input_pos.tolist()):
            assert start + length <= cache.max_seq_len
            cache.tokens[row, start : start + length] = input_ids[row]
            for position, index in enumerate(logits_index[row].tolist()):
                total = int(cache.tokens[row, : start + index + 1].sum()) + 1
                logits[row, position, total % self.vocab_size] = 5
        if len(self.steps) in self.logits_at_step:
            logits[-1] = self.logits_at_step[len(self.steps)]
        self.steps.append((rows, length))
        return StepLogits(logits)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def scripted_session() -> ScriptedSession:
    """Return a session that needs no model."""
    return ScriptedSession()


@pytest.fixture
def scripted_generator(text_checkpoint: Folders, scripted_session: ScriptedSession) -> Any:
    """Return `scripted_generator(**arguments)`: the script's generator; the tokenizer is real."""
    folder = text_checkpoint("gemma1")
    scripted_session.vocab_size = VOCAB_SIZE

    def make(**arguments: Any) -> TextGenerator:
        tokenizer = GemmaTokenizer.from_pretrained(folder)
        return TextGenerator(scripted_session, tokenizer, ModelSource.open(folder), **arguments)

    return make


def _train_tokenizer() -> Tokenizer:
    """Train a byte-fallback BPE in Gemma's layout, as large as the tiny models' vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    # Of the trainer's special tokens the bytes are ordinary vocabulary, as in Gemma's file.
    file = json.loads(tokenizer.to_str())
    file["added_tokens"] = [one for one in file["added_tokens"] if one["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(file))
    # Text is too short for all merges; the rest of the vocabulary are words of their own.
    tokenizer.add_tokens([f"▁w{i}" for i in range(VOCAB_SIZE - tokenizer.get_vocab_size())])
    return tokenizer

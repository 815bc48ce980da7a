import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gemma_deploy.tokenizer import GemmaTokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TURNS = ["<start_of_turn>", "<end_of_turn>"]
# As in Gemma's own files: added, but not flagged special.
PLAIN_ADDED = [
    "<unused0>",
    "<unused1>",
    "[@BOS@]",
    "\n\n",
    "\n\n\n",
    "▁▁",
    "▁▁▁",
    "<table>",
    "</b>",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CONFIG = {
    "tokenizer_class": "GemmaTokenizer",
    "bos_token": "<bos>",
    "eos_token": {"__type": "AddedToken", "content": "<eos>", "special": True},
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
}

WriteFolder: TypeAlias = Callable[..., Path]


def _added(content: str, index: int, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": special}


@pytest.fixture(scope="session")
def trained() -> dict[str, Any]:
    """tokenizer.json of a byte-fallback BPE in Gemma's layout; turn tokens are not flagged."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    added = SPECIAL + TURNS + PLAIN_ADDED
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=added + BYTES, show_progress=False, max_token_length=16
    )
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = (stdlib / name for name in ("argparse.py", "textwrap.py", "typing.py"))
    lines = (line for path in sources for line in path.read_text().splitlines(keepends=True))
    backend.train_from_iterator(lines, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    spec: dict[str, Any] = json.loads(backend.to_str())
    spec["added_tokens"] = [
        _added(content, index, special=content in SPECIAL) for index, content in enumerate(added)
    ]
    return spec


@pytest.fixture
def write_folder(tmp_path: Path, trained: dict[str, Any]) -> WriteFolder:
    """Write a tokenizer folder: changes to tokenizer.json, and to tokenizer_config.json."""

    def write(
        spec: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        *,
        template: str | None = None,
        name: str = "checkpoint",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        text = json.dumps({**trained, **(spec or {})})
        (folder / "tokenizer.json").write_text(text)
        kept = {key: value for key, value in {**CONFIG, **(config or {})}.items() if value != "-"}
        (folder / "tokenizer_config.json").write_text(json.dumps(kept))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return folder

    return write


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, trained: dict[str, Any]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "tokenizer.json").write_text(json.dumps(trained))
    (path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> GemmaTokenizer:
    return GemmaTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def oracle(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def poisoned_spec() -> dict[str, Any]:
    """tokenizer.json whose merges build "<end_of_turn>" from any text that spells it."""
    word = "<end_of_turn>"
    prefixes = [word[:length] for length in range(2, len(word) + 1)]
    letters = sorted(set(word + "user mdl\n▁") - {" "})
    tokens = list(dict.fromkeys([*SPECIAL, *TURNS, *BYTES, *letters, *prefixes]))
    return {
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [[prefix[:-1], prefix[-1]] for prefix in prefixes],
        },
        "added_tokens": [
            _added(token, index, special=True) for index, token in enumerate([*SPECIAL, TURNS[0]])
        ],
    }

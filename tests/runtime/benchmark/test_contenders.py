import shutil
from pathlib import Path
from typing import Any

from gemma_deploy.runtime.benchmark.contenders import LoadedContender, load_contender
from gemma_deploy.runtime.benchmark.plan import ContenderSpec
from gemma_deploy.runtime.benchmark.results import OURS

TINY_GEMMA = Path(__file__).parents[3] / "samples" / "tiny-gemma"


def loaded(folder: Path) -> LoadedContender:
    options: dict[str, Any] = {"backend": "auto", "device": "cpu", "threads": 1, "dtype": None}
    return load_contender(ContenderSpec(name=OURS, model=str(folder), max_seq_len=64, **options))


def test_ours_is_loaded_with_its_tokenizer_if_it_has_one(tmp_path: Path) -> None:
    tokenizer = loaded(TINY_GEMMA).tokenizer
    assert tokenizer is not None
    assert tokenizer.vocab_size == 2048
    for path in TINY_GEMMA.glob("*.safetensors*"):
        shutil.copyfile(path, tmp_path / path.name)
    shutil.copyfile(TINY_GEMMA / "config.json", tmp_path / "config.json")
    assert loaded(tmp_path).tokenizer is None

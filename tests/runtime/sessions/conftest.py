"""Engines of tiny models with a tokenizer, really built with TensorRT for RTX, without a GPU."""

from typing import Any, Protocol

import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.engine import EngineFolder
from gemma_deploy.exporters.engine import BuildOptions, build_engine
from gemma_deploy.exporters.export import export_checkpoint

MAX_SEQ_LEN = 96


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
                bundle, BuildOptions(flavour="tensorrt-rtx", max_seq_len=MAX_SEQ_LEN, **given)
            ).engine
        return engines[key]

    return get


@pytest.fixture(scope="session")
def engine_bundle(text_engine: Engines) -> Bundle:
    """Return a bundle with one engine; do not change it."""
    return Bundle.open(text_engine().folder.parent.parent)

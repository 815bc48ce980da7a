"""A model and its tokenizer, loaded at the same time: `open_model`."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from gemma_deploy.freed_memory import return_freed_memory
from gemma_deploy.runtime.sessions.registry import create_session, natural_backend
from gemma_deploy.runtime.sessions.session import Session
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.tokenizer import GemmaTokenizer

# The library `tokenizers` holds Python's lock as long as it reads a file. ONNX Runtime lets go of it
# once it has read the graph, within some 20 ms. Whichever is first, the result is the same.
_HEAD_START_S: Final = 0.05


def open_model(
    source: ModelSource, *, backend: str = "auto", **session_options: Any
) -> tuple[Session, GemmaTokenizer]:
    """Create a model's session and read its tokenizer, beside each other on ONNX Runtime.

    Whatever fails, no thread and no session is left. Of two errors the tokenizer's is raised.

    Args:
        source: The model.
        backend: As for `create_session`.
        **session_options: Further keyword arguments of `create_session`.

    Raises:
        TokenizerError: The tokenizer cannot be read.
        GemmaDeployError: As `create_session`.
    """
    if backend == "auto":
        backend = natural_backend(source)
    if backend == "onnxruntime":
        opened = _beside(source, backend=backend, **session_options)
    else:  # before a large model is loaded
        tokenizer = GemmaTokenizer.from_pretrained(source.folder)
        opened = create_session(source, backend=backend, **session_options), tokenizer
    return_freed_memory()
    return opened


def _beside(source: ModelSource, **session_options: Any) -> tuple[Session, GemmaTokenizer]:
    reading: list[Future[GemmaTokenizer]] = []
    with ThreadPoolExecutor(1, "gemma-deploy-tokenizer") as pool:
        try:
            session = create_session(
                source,
                before_load=lambda: reading.append(pool.submit(_read_later, source.folder)),
                **session_options,
            )
        except Exception:
            _ = reading[0].result() if reading else GemmaTokenizer.from_pretrained(source.folder)
            raise
        try:
            tokenizer = reading[0].result()
            source.check_unchanged()  # the tokenizer may have been read last
        except BaseException:
            session.close()
            raise
        return session, tokenizer


def _read_later(folder: Path) -> GemmaTokenizer:
    time.sleep(_HEAD_START_S)
    return GemmaTokenizer.from_pretrained(folder)

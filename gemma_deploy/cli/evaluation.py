"""A text read by a model, and by what it was made of: the work of `gemma-deploy evaluate`."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.checkpoint_files import require_checkpoint
from gemma_deploy.cli.checks import require_same_model
from gemma_deploy.cli.console import Progress
from gemma_deploy.errors import RequestError
from gemma_deploy.evaluation import Evaluator, Window, windows
from gemma_deploy.quantization.advice import distance_warning
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.scoring import TextLogits, piece_size
from gemma_deploy.runtime.sessions.registry import create_session
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.tokenizer import GemmaTokenizer

if TYPE_CHECKING:
    from gemma_deploy.runtime.sessions.session import Session

DEFAULT_CONTEXT_TOKENS: Final = 512
# The figures of fewer say nothing.
_MIN_TEXT_TOKENS: Final = 16
_MOST_NAMED_TOKENS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEvaluation:
    """What to read, and with what.

    Attributes:
        model: Folder of a bundle, a checkpoint or a packed engine.
        reference: The checkpoint it is compared with; None for no comparison.
        text: What is read.
        context_tokens: Most tokens that the model sees, `<bos>` included; None for 512, or less if
            the model is made for less.
        stride: Tokens between the beginnings of two windows; None for half of the context.
        max_tokens: Most tokens of the text that are read; None for all.
        backend: See `gemma_deploy.load`.
        device: See `gemma_deploy.load`.
        threads: See `gemma_deploy.load`.
    """

    model: Path
    reference: Path | None
    text: str
    context_tokens: int | None
    stride: int | None
    max_tokens: int | None
    backend: str
    device: str
    threads: int | None

    def run(self, on_progress: Progress) -> "FinishedEvaluation":
        """Read the text.

        Raises:
            RequestError: A path that is not there, a text that is too short, or sizes beyond the
                model's.
            CheckpointError: The reference is another model, or damaged.
            BundleError, EngineError: The model's folder is damaged.
            NonFiniteLogitsError: The model put out NaN or infinity.
            SessionError: The backend failed.
        """
        source = ModelSource.open(self.model)
        if self.reference is not None:
            require_checkpoint(self.reference)
        bos, token_ids = self._tokens(source)
        if self.reference is not None:
            require_same_model(
                source.folder, source.stored_config(), Checkpoint.open(self.reference)
            )
        context = self._context_tokens(source)
        stride = self.stride or max(1, context // 2)
        parts = windows(len(token_ids), context, stride)
        evaluator = Evaluator()
        with ExitStack() as stack:
            on_progress("loading the model", 0, 1)
            sessions = [stack.enter_context(closing(self._session(source, context)))]
            if self.reference is not None:
                on_progress("loading the reference", 0, 1)
                sessions.append(
                    stack.enter_context(closing(self._reference_session(self.reference)))
                )
            size = piece_size(*sessions)
            readers = [TextLogits(session, context, piece_tokens=size) for session in sessions]
            for window in parts:
                on_progress("reading the text", window.first, len(token_ids))
                _read(window, token_ids, bos, readers, evaluator)
        return FinishedEvaluation(
            evaluator=evaluator,
            token_ids=token_ids,
            context_tokens=context,
            stride=stride,
            warning=_warning(source, evaluator),
        )

    def _tokens(self, source: ModelSource) -> tuple[int, npt.NDArray[np.int64]]:
        """Return `<bos>`, and the text's tokens behind it."""
        tokenizer = GemmaTokenizer.from_pretrained(source.folder)
        # Control tokens that the text spells out are characters like any others.
        bos, *token_ids = tokenizer.encode(self.text, add_bos=True, allow_special=False)
        token_ids = token_ids[: self.max_tokens]
        if len(token_ids) < _MIN_TEXT_TOKENS:
            raise RequestError(
                f"the text has {len(token_ids)} tokens; at least {_MIN_TEXT_TOKENS} are needed, and "
                "thousands for figures that mean something: give a longer one"
            )
        vocab_size = source.config.vocab_size
        unknown = [tokenizer.id_to_token(x) for x in sorted(set(token_ids)) if x >= vocab_size]
        if unknown:
            named = ", ".join(map(repr, unknown[:_MOST_NAMED_TOKENS]))
            raise RequestError(
                f"the text holds {named}{', ...' if len(unknown) > _MOST_NAMED_TOKENS else ''}, which "
                f"the tokenizer knows and the model has no embedding of ({vocab_size} tokens): take "
                "it out of the text, or use the tokenizer that belongs to the model"
            )
        return bos, np.array(token_ids, np.int64)

    def _context_tokens(self, source: ModelSource) -> int:
        if self.context_tokens is None:
            return min(DEFAULT_CONTEXT_TOKENS, source.max_seq_len)
        if self.context_tokens > source.max_seq_len:
            raise RequestError(
                f"--context-tokens is {self.context_tokens:,}; this model is made for up to "
                f"{source.max_seq_len:,}"
            )
        return self.context_tokens

    def _session(self, source: ModelSource, context_tokens: int) -> "Session":
        return create_session(
            source,
            backend=self.backend,
            device=self.device,
            threads=self.threads,
            max_seq_len=context_tokens,
        )

    def _reference_session(self, checkpoint: Path) -> "Session":
        from gemma_deploy.runtime.sessions.torch_session import TorchSession

        # A CUDA device of the model's backend need not be one of torch's.
        device = Device(kind="cpu" if self.device == "cpu" else "auto")
        return TorchSession(checkpoint, device=device, threads=self.threads, dtype="float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvaluation:
    """What was found, and how.

    Attributes:
        evaluator: The figures of each position.
        token_ids: int64, the text's tokens; `<bos>` is not among them.
        context_tokens: Most tokens that the model saw.
        stride: Tokens between the beginnings of two windows.
        warning: What would be closer to the reference, of a quantized bundle that is far from it.
    """

    evaluator: Evaluator
    token_ids: npt.NDArray[np.int64]
    context_tokens: int
    stride: int
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them."""
        figures = dataclasses.asdict(self.evaluator.result())
        return {
            **figures,
            "context_tokens": self.context_tokens,
            "stride": self.stride,
            "warning": self.warning,
        }


def _warning(source: ModelSource, evaluator: Evaluator) -> str | None:
    kl = evaluator.result().kl_mean_nats
    if source.bundle is None or kl is None:
        return None
    manifest = source.bundle.manifest
    if not manifest.formats and manifest.precision.cache != "int8":
        return None
    return distance_warning(manifest, kl, is_weights_only=False)


def _read(
    window: Window,
    token_ids: npt.NDArray[np.int64],
    bos: int,
    readers: Sequence[TextLogits],
    evaluator: Evaluator,
) -> None:
    """Read a window with the model, and with the reference if there is one, a piece at a time."""
    inputs = window.inputs(token_ids, bos)
    position = window.first
    pieces = zip(
        *(reader.pieces(inputs, window.first - window.start) for reader in readers), strict=True
    )
    for logits, *reference in pieces:
        targets = token_ids[position : position + len(logits)]
        evaluator.add(logits, targets, *reference)
        position += len(logits)

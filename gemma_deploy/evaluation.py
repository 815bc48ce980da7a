"""How well a model predicts a text: the windows it is read in, and the figures.

A text of any length is read in windows of at most C tokens, `<bos>` included, so the model never sees
more. Each window begins with `<bos>` and then stands D tokens (the stride) further into the text than
the one before. A window predicts what no window before it did: the first one its C tokens, each later
one the next D. So every token of the text is predicted exactly once, by at least C - D tokens of the
text before it (and `<bos>`), except the first C, which have all the text there is before them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gemma_deploy.errors import CheckpointError, NonFiniteLogitsError, RequestError
from gemma_deploy.parity import FloatArray, log_softmax

# Rows of logits whose probabilities are computed at a time: 16 x 262144 x 8 bytes is 34 MB.
_BLOCK_ROWS = 16
_TAIL_PERCENT = 99


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a text that the model reads behind `<bos>`.

    Attributes:
        start: Index in the text of the first token that is read.
        first: Index of the first token that is predicted, from `start` up.
        stop: One past the last token that is predicted.
    """

    start: int
    first: int
    stop: int

    def inputs(self, token_ids: npt.NDArray[np.int64], bos: int) -> npt.NDArray[np.int64]:
        """Return what the model reads: `<bos>`, and all but the last token. [stop - start]."""
        return np.concatenate(([bos], token_ids[self.start : self.stop - 1]))


def windows(num_tokens: int, context_tokens: int, stride: int) -> Iterator[Window]:
    """Return the windows of a text, in its order; see the module.

    Args:
        num_tokens: Length of the text, `<bos>` not counted.
        context_tokens: C, the most tokens of a window.
        stride: D, from 1 to C.

    Raises:
        RequestError: The stride is out of range.
    """
    if not 1 <= stride <= context_tokens:
        raise RequestError(
            f"stride is {stride}; expected 1 to the context's {context_tokens} tokens, or some would "
            "never be predicted"
        )
    return _windows(num_tokens, context_tokens, stride)


def _windows(num_tokens: int, context_tokens: int, stride: int) -> Iterator[Window]:
    first = 0
    for start in range(0, num_tokens, stride):
        if first == num_tokens:
            return
        stop = min(start + context_tokens, num_tokens)
        yield Window(start, first, stop)
        first = stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How well a model predicts a text, and how far it is from a reference.

    Without a reference `reference_perplexity` and what follows it are None.

    Attributes:
        tokens: Number of tokens that were predicted.
        perplexity: exp of the mean negative log-likelihood of the text's tokens.
        reference_perplexity: The reference's.
        kl_mean_nats: Mean of KL(reference || model) of the next-token distributions, in nats.
        kl_p99_nats: Its 99th percentile, interpolated linearly between positions.
        kl_max_nats: Its largest.
        top1_agreement: Share of positions where both find the same token likeliest.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float | None
    kl_mean_nats: float | None
    kl_p99_nats: float | None
    kl_max_nats: float | None
    top1_agreement: float | None


class Evaluator:
    """Collects what each position says; 24 bytes a position, whatever the vocabulary."""

    def __init__(self) -> None:
        self._nll: list[FloatArray] = []
        self._reference_nll: list[FloatArray] = []
        self._kl: list[FloatArray] = []
        self._num_same = 0
        self._num_tokens = 0

    def add(
        self,
        logits: FloatArray,
        targets: npt.NDArray[np.int64],
        reference: FloatArray | None = None,
    ) -> None:
        """Take in logits [P, V] of P positions, the next after those taken in before.

        Args:
            logits: The model's.
            targets: The tokens [P] that the text has there.
            reference: The reference's logits; given every time or never.

        Raises:
            NonFiniteLogitsError: The model's logits are NaN or infinite.
            CheckpointError: The reference's are.
        """
        for start in range(0, len(targets), _BLOCK_ROWS):
            rows = slice(start, start + _BLOCK_ROWS)
            self._add_rows(
                logits[rows], targets[rows], None if reference is None else reference[rows]
            )

    def result(self) -> Evaluation:
        """Return the figures of everything taken in.

        Raises:
            ValueError: That is nothing.
        """
        if not self._num_tokens:
            raise ValueError("no token was predicted")
        kl = self.kl_nats
        return Evaluation(
            tokens=self._num_tokens,
            perplexity=_perplexity(self.nll_nats),
            reference_perplexity=_perplexity(np.concatenate(self._reference_nll))
            if kl is not None
            else None,
            kl_mean_nats=float(kl.mean()) if kl is not None else None,
            kl_p99_nats=float(np.percentile(kl, _TAIL_PERCENT)) if kl is not None else None,
            kl_max_nats=float(kl.max()) if kl is not None else None,
            top1_agreement=self._num_same / self._num_tokens if kl is not None else None,
        )

    @property
    def nll_nats(self) -> npt.NDArray[np.float64]:
        """Negative log-likelihood of the text's token at each position, in nats."""
        return np.concatenate(self._nll)

    @property
    def kl_nats(self) -> npt.NDArray[np.float64] | None:
        """KL(reference || model) at each position, in nats; None without a reference."""
        return np.concatenate(self._kl) if self._kl else None

    def _add_rows(
        self, logits: FloatArray, targets: npt.NDArray[np.int64], reference: FloatArray | None
    ) -> None:
        if not np.isfinite(logits).all():
            raise NonFiniteLogitsError(
                f"the model put out NaN or infinity within {len(targets)} tokens of token "
                f"{self._num_tokens} of the text. A float16 model most likely overflowed: export it "
                "again, with calibration, or with --dtype bfloat16 or float32"
            )
        log_q = log_softmax(logits)
        picked = (np.arange(len(targets)), targets)
        self._nll.append(-log_q[picked])
        self._num_tokens += len(targets)
        if reference is None:
            return
        if not np.isfinite(reference).all():
            raise CheckpointError(
                "the reference itself gives logits that are NaN or infinite in float32, so nothing can "
                "be compared with it: its weights are damaged; download it again"
            )
        log_p = log_softmax(reference)
        self._reference_nll.append(-log_p[picked])
        # Rounding may leave -1e-17 where the distributions are equal.
        self._kl.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).clip(min=0.0))
        self._num_same += int((logits.argmax(axis=-1) == reference.argmax(axis=-1)).sum())


def token_log_likelihoods(
    logits: FloatArray, targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the log-probability, in nats, that logits [P, V] give to the tokens [P]; [P]."""
    found = np.empty(len(targets))
    for start in range(0, len(targets), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        log_p = log_softmax(logits[rows])
        found[rows] = np.take_along_axis(log_p, targets[rows, None], axis=-1)[:, 0]
    return found


def _perplexity(nll_nats: npt.NDArray[np.float64]) -> float:
    mean = float(nll_nats.mean())
    try:
        return math.exp(mean)
    except OverflowError as err:  # from 710 nats a token on: logits of a model that is no model
        raise NonFiniteLogitsError(
            f"the text's tokens have {mean:g} nats each, a perplexity beyond any number: the model's "
            "weights are damaged, or the tokenizer is not its own"
        ) from err

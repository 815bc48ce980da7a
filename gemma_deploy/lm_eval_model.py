r"""A bundle, checkpoint or engine as a model of lm-evaluation-harness: `GemmaDeployLM`.

Importing this module registers it as `gemma-deploy`; as a program it is lm-eval's own, which then
knows that model:

    python -m gemma_deploy.lm_eval_model run --model gemma-deploy --model_args path=BUNDLE \
        --device cpu --tasks piqa

Without --device lm-eval asks for cuda:0. The package is the extra lm-eval: `pip install ".[lm-eval]"` in a clone
(https://github.com/EleutherAI/lm-evaluation-harness).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from gemma_deploy.api import load
from gemma_deploy.errors import RequestError
from gemma_deploy.evaluation import token_log_likelihoods, windows
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.scoring import TextLogits

DEFAULT_MAX_LENGTH: Final = 2048
_DEFAULT_NEW_TOKENS: Final = 256


@register_model("gemma-deploy")
class GemmaDeployLM(LM):  # type: ignore[misc]  # lm-eval is optional: its types may not be there
    """Answers lm-eval's requests, one at a time.

    Every text begins with `<bos>`, without which a Gemma predicts badly: also where a long one is cut
    on the left, and each window of a rolling log-likelihood.

    Args:
        path: Folder of a bundle, a checkpoint or a packed engine.
        backend: See `gemma_deploy.load`.
        device: See `gemma_deploy.load`; None is `auto`.
        threads: See `gemma_deploy.load`.
        max_length: Most tokens that the model sees; None for 2048, or the model's limit if it is less.
        batch_size: What lm-eval passes to every model; requests run one at a time whatever it is.
        max_batch_size: The same.

    Raises:
        RequestError, BundleError, CheckpointError, SessionError: As `gemma_deploy.load`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        backend: str = "auto",
        device: str | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        batch_size: int | str | None = None,  # noqa: ARG002 - lm-eval's
        max_batch_size: int | None = None,  # noqa: ARG002 - lm-eval's
    ) -> None:
        super().__init__()
        self._path = Path(path)
        self._generator = load(
            path, backend=backend, device=device or "auto", max_seq_len=max_length, threads=threads
        )
        self.max_length = max_length or min(DEFAULT_MAX_LENGTH, self._generator.max_seq_len)
        self._logits = TextLogits(self._generator.session, self.max_length)
        self._tokenizer = self._generator.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """What tells this model's chat template apart in lm-eval's cache."""
        return self._path.name

    def close(self) -> None:
        """Free the model; it cannot be asked afterwards."""
        self._generator.close()

    def loglikelihood(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,  # noqa: ARG002 - lm-eval's
    ) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) how likely the continuation is.

        Tokens are split as lm-eval splits them: spaces at the context's end belong to the
        continuation, and both are encoded together.

        Args:
            requests: Instances, whose `args` are (context, continuation).
            disable_tqdm: Not used.

        Returns:
            The log-probability in nats, and whether greedy decoding gives the continuation.

        Raises:
            RequestError: A continuation has more tokens than `max_length`.
        """
        return self._answers("loglikelihood", requests, self._continuation)

    def loglikelihood_rolling(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,  # noqa: ARG002 - lm-eval's
    ) -> list[float]:
        """Return for each text its log-probability in nats.

        A text longer than `max_length` is read in windows of so many tokens that do not overlap.

        Args:
            requests: Instances, whose `args` are (text,).
            disable_tqdm: Not used.
        """
        return self._answers("loglikelihood_rolling", requests, self._text)

    def generate_until(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,  # noqa: ARG002 - lm-eval's
    ) -> list[str]:
        """Return for each context what the model says up to the first of its stop strings.

        Args:
            requests: Instances, whose `args` are (context, keywords): `until`, `max_gen_toks`,
                `do_sample`, `temperature`, `top_k`, `top_p`. Without `do_sample` or a `temperature`
                above 0 decoding is greedy, whatever the model's generation_config.json says.
            disable_tqdm: Not used.
        """
        return self._answers("generate_until", requests, self._generated)

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,
    ) -> str:
        """Return a conversation as the model's chat template writes it."""
        return self._tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def _answers(self, kind: str, requests: Iterable[Any], answer: Callable[..., Any]) -> list[Any]:
        found = []
        for request in requests:
            found.append(answer(*request.args))
            self.cache_hook.add_partial(kind, request.args, found[-1])
        return found

    def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        stripped = context.rstrip()
        bos, *before = self._tokenizer.encode(stripped, add_bos=True, add_eos=False)
        _, *whole = self._tokenizer.encode(context + continuation, add_bos=True, add_eos=False)
        wanted = whole[len(before) :]
        if len(wanted) > self.max_length:
            raise RequestError(
                f"a continuation has {len(wanted):,} tokens; the model sees {self.max_length:,}: "
                "choose a larger max_length"
            )
        # <bos> and all but the last token are read.
        return self._scored(bos, whole[-self.max_length :], len(wanted))

    def _text(self, text: str) -> float:
        bos, *token_ids = self._tokenizer.encode(text, add_bos=True, add_eos=False)
        parts = windows(len(token_ids), self.max_length, self.max_length)
        return sum(
            self._scored(bos, token_ids[part.start : part.stop], part.stop - part.first)[0]
            for part in parts
        )

    def _scored(self, bos: int, token_ids: Sequence[int], count: int) -> tuple[float, bool]:
        """Score the last `count` tokens of a text that is read behind `<bos>`."""
        inputs = np.array([bos, *token_ids[:-1]], np.int64)
        targets = np.array(token_ids[len(token_ids) - count :], np.int64)
        total, is_greedy, start = 0.0, True, 0
        for logits in self._logits.pieces(inputs, len(inputs) - count) if count else ():
            part = targets[start : start + len(logits)]
            total += float(token_log_likelihoods(logits, part).sum())
            is_greedy &= bool((logits.argmax(axis=-1) == part).all())
            start += len(logits)
        return total, is_greedy

    def _generated(self, context: str, keywords: Mapping[str, Any]) -> str:
        new_tokens = int(keywords.get("max_gen_toks", _DEFAULT_NEW_TOKENS))
        options = _options(keywords, new_tokens)
        until = keywords.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        token_ids = self._tokenizer.encode(context, add_bos=True, add_eos=False)
        room = self.max_length - new_tokens
        if room < 1:
            raise RequestError(
                f"max_gen_toks is {new_tokens:,}; it must be below max_length, {self.max_length:,}"
            )
        if len(token_ids) > room:
            context = self._tokenizer.decode(
                token_ids[len(token_ids) - room + 1 :], skip_special_tokens=False
            )
        text = ""
        with self._generator.stream(context, options) as stream:
            for piece in stream:
                text += piece
                ends = [text.index(stop) for stop in stops if stop and stop in text]
                if ends:
                    return text[: min(ends)]
        return text


def _options(keywords: Mapping[str, Any], new_tokens: int) -> GenerationOptions:
    """Return what a task asks for; a measurement leaves nothing to generation_config.json."""
    temperature = keywords.get("temperature") or None
    if not keywords.get("do_sample", temperature is not None):
        temperature = 0.0
    return GenerationOptions(
        max_new_tokens=new_tokens,
        temperature=1.0 if temperature is None else temperature,
        top_k=keywords.get("top_k") or 0,
        top_p=keywords.get("top_p") or 1.0,
        repetition_penalty=1.0,
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

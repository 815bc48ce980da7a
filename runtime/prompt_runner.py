"""Encoded prompts to text, in batches or as a stream: `PromptRunner`."""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

from gemma_deploy.runtime.batch_runner import BatchRunner, OnProgress
from gemma_deploy.runtime.prompts import Prompt
from gemma_deploy.runtime.request import GenerationOptions, whole_number
from gemma_deploy.runtime.result import GenerationResult
from gemma_deploy.runtime.rows import Row
from gemma_deploy.runtime.streaming import TextStream
from gemma_deploy.runtime.turns import SharedIterator
from gemma_deploy.tokenizer import GemmaTokenizer


class PromptRunner:
    """Runs prompts of one tokenizer and makes text of what the model says.

    Args:
        batches: What runs them.
        tokenizer: What encoded them.
        model_eos_token_ids: Tokens that end a text by the model's files.

    Attributes:
        eos_token_ids: The tokens that end a text: the model's, the tokenizer's, and the end of a turn
            if the checkpoint has a chat template.
    """

    def __init__(
        self,
        batches: BatchRunner,
        tokenizer: GemmaTokenizer,
        model_eos_token_ids: frozenset[int],
    ) -> None:
        self._batches = batches
        self._tokenizer = tokenizer
        eos = model_eos_token_ids
        if tokenizer.eos_token_id is not None:
            eos |= {tokenizer.eos_token_id}
        if tokenizer.has_chat_template:
            eos |= tokenizer.end_of_turn_ids
        self.eos_token_ids = eos

    def results(
        self,
        prompts: Sequence[Prompt],
        options: GenerationOptions,
        *,
        batch_size: int,
        is_cancelled: Callable[[], bool],
        on_progress: OnProgress,
    ) -> Iterator[GenerationResult]:
        """Check everything at once; run a batch when its first result is asked for.

        Raises:
            RequestError: `batch_size` is no number above 0; and as `TextGenerator.generate`.
        """
        batch_size = whole_number("batch_size", batch_size, 1)
        batch_size = min(batch_size, self._batches.max_batch_size or batch_size)
        ids = [prompt.token_ids for prompt in prompts]
        capacity = self._batches.capacity(ids, options) if prompts else 0
        stops = self._stop_token_ids(prompts, options)

        def results() -> Generator[GenerationResult]:
            is_interrupted = False
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                batch = self._batches.start(
                    ids[part], options, capacity, stop_token_ids=stops, first_row=start
                )
                if is_interrupted:
                    batch.cancel()
                else:
                    is_interrupted = self._batches.run(batch, is_cancelled, on_progress)
                for prompt, row in zip(prompts[part], batch.rows, strict=True):
                    yield _result(prompt, row, self._text_of(row))

        return SharedIterator(results(), "the iterator of results", self._batches.is_inside)

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        is_cancelled: Callable[[], bool],
        on_progress: OnProgress,
    ) -> TextStream:
        """Check a prompt; run it when the stream is asked for a piece."""
        capacity = self._batches.capacity([prompt.token_ids], options)
        batch = self._batches.start(
            [prompt.token_ids],
            options,
            capacity,
            stop_token_ids=self._stop_token_ids([prompt], options),
        )
        detokenizer = self._tokenizer.stream()
        return TextStream(
            batch.rows[0],
            self._batches.steps(batch, is_cancelled, on_progress),
            push=lambda token_id: detokenizer.push(token_id) if self._has_text(token_id) else "",
            finish=detokenizer.finish,
            to_result=partial(_result, prompt),
            is_inside=self._batches.is_inside,
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of what the model said, all tokens of it."""
        known = [token_id for token_id in token_ids if self._has_text(token_id)]
        return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)

    def _stop_token_ids(
        self, prompts: Sequence[Prompt], options: GenerationOptions
    ) -> frozenset[int]:
        stops = frozenset(options.stop_token_ids)
        if options.ignore_eos:
            return stops
        if any(prompt.is_chat for prompt in prompts):
            stops |= self._tokenizer.end_of_turn_ids
        return stops | self.eos_token_ids

    def _text_of(self, row: Row) -> str:
        # The token that ended the text is no part of it.
        return self.decode(row.new_tokens[:-1] if row.finish_reason == "stop" else row.new_tokens)

    def _has_text(self, token_id: int) -> bool:
        # Embeddings are often padded with rows that the tokenizer knows nothing of.
        return token_id < self._tokenizer.vocab_size


def _result(prompt: Prompt, row: Row, text: str) -> GenerationResult:
    return GenerationResult(
        prompt=prompt.text,
        text=text,
        prompt_token_ids=tuple(prompt.token_ids),
        token_ids=row.new_tokens,
        finish_reason=row.finish_reason or "cancelled",
        timings=row.timings(),
    )

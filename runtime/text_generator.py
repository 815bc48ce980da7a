"""Prompts to text with a loaded model: `TextGenerator`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.batch_runner import BatchRunner
from gemma_deploy.runtime.capacity import check_max_seq_len
from gemma_deploy.runtime.generator import PREFILL_CHUNK_TOKENS, never
from gemma_deploy.runtime.prompts import (
    Message,
    Prompt,
    chat_prompt,
    ending_with_the_turn,
    text_prompt,
)
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.result import GenerationResult
from gemma_deploy.runtime.rows import Row
from gemma_deploy.runtime.sessions.registry import create_session
from gemma_deploy.runtime.sessions.session import Session
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.streaming import TextStream
from gemma_deploy.tokenizer import GemmaTokenizer

DEFAULT_BATCH_SIZE = 8


class TextGenerator:
    """A loaded model that continues prompts; a context manager that frees it.

    Calls share one KV cache: a new call cancels a stream that is still open, and threads must take
    turns.

    Attributes:
        session: What runs the steps.
        tokenizer: Text to token ids and back.
        max_seq_len: Most tokens in the KV cache: the prompt's and the text's but the last, which
            needs no place there.
        generation_config: Contents of the model's generation_config.json.
        eos_token_ids: The tokens that end a text by the model's own account.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: GemmaTokenizer,
        source: ModelSource,
        *,
        max_seq_len: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK_TOKENS,
    ) -> None:
        """Put the parts together; `gemma_deploy.load` is the short way.

        Args:
            session: A session of the source's model.
            tokenizer: The source's tokenizer.
            source: Where limits and defaults come from.
            max_seq_len: Capacity of the KV cache, in tokens; None for what each call needs.
            prefill_chunk: Most tokens of a prompt in one step.

        Raises:
            RequestError: `max_seq_len` is beyond what the model or the session is made for.
        """
        limit = min(source.max_seq_len, session.limits.max_seq_len or source.max_seq_len)
        check_max_seq_len(max_seq_len, limit)
        self.session = session
        self.tokenizer = tokenizer
        self.config = source.config
        self.max_seq_len = max_seq_len or limit
        self.generation_config: Mapping[str, Any] = source.generation_config
        self.eos_token_ids = source.eos_token_ids
        self._runner = BatchRunner(
            session,
            max_seq_len=max_seq_len,
            limit=limit,
            prefill_chunk=prefill_chunk,
        )

    @classmethod
    def open(
        cls,
        source: ModelSource,
        *,
        backend: str = "auto",
        device: str = "auto",
        max_seq_len: int | None = None,
        threads: int | None = None,
        prepacked_cache: Path | None = None,
    ) -> "TextGenerator":
        """Load a model and its tokenizer; see `gemma_deploy.load`."""
        check_max_seq_len(max_seq_len, source.max_seq_len)
        tokenizer = GemmaTokenizer.from_pretrained(source.folder)
        session = create_session(
            source,
            backend=backend,
            device=device,
            threads=threads,
            max_seq_len=max_seq_len,
            prepacked_cache=prepacked_cache,
        )
        try:
            return cls(session, tokenizer, source, max_seq_len=max_seq_len)
        except RequestError:
            session.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its KV cache; the generator cannot be used afterwards."""
        self._runner.free()
        self.session.close()

    def generate(
        self,
        prompts: str | Sequence[str],
        options: GenerationOptions | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        is_cancelled: Callable[[], bool] = never,
        **overrides: Any,
    ) -> list[GenerationResult]:
        """Continue each prompt.

        Ctrl-C ends the call, not the program: what was generated is returned, rows that had not ended
        say `cancelled`.

        Args:
            prompts: One prompt or several.
            options: How to choose tokens and when to stop; None for greedy decoding.
            batch_size: Most prompts that run at a time, where the session takes as many; it changes
                speed and memory, not the text.
            is_cancelled: Asked before each step; True ends the call as Ctrl-C does.
            **overrides: Fields of `GenerationOptions` that replace those of `options`.

        Returns:
            One result for each prompt, in their order.

        Raises:
            RequestError: An empty prompt, token ids the model does not have, bad options.
            PromptTooLongError: A prompt that does not fit the KV cache; nothing has run then.
            NonFiniteLogitsError: The model put out NaN or infinity.
            SessionError: The backend failed.
        """
        return list(
            self.generate_each(
                prompts, options, batch_size=batch_size, is_cancelled=is_cancelled, **overrides
            )
        )

    def generate_each(
        self,
        prompts: str | Sequence[str],
        options: GenerationOptions | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        is_cancelled: Callable[[], bool] = never,
        **overrides: Any,
    ) -> Iterator[GenerationResult]:
        """Yield what `generate` returns, each batch as soon as it is done.

        All prompts are checked at once; the model first runs when a result is asked for.
        """
        options = _with_overrides(options, overrides)
        texts = [prompts] if isinstance(prompts, str) else prompts
        encoded = [text_prompt(self.tokenizer, text, n) for n, text in enumerate(texts)]
        return self._results(encoded, options, batch_size, is_cancelled)

    def stream(
        self,
        prompt: str,
        options: GenerationOptions | None = None,
        *,
        is_cancelled: Callable[[], bool] = never,
        **overrides: Any,
    ) -> TextStream:
        """Continue one prompt and yield its text as it comes; see `generate`.

        The prompt is checked at once; the model first runs when the stream is asked for a piece.
        """
        options = _with_overrides(options, overrides)
        return self._stream(text_prompt(self.tokenizer, prompt), options, is_cancelled)

    def chat(
        self,
        messages: Sequence[Message],
        options: GenerationOptions | None = None,
        *,
        is_cancelled: Callable[[], bool] = never,
        **overrides: Any,
    ) -> TextStream:
        """Answer the last message of a conversation and yield the answer as it comes.

        Args:
            messages: Each with `role` and `content`, the user's last; the caller keeps the history.
            options: As for `generate`; `<end_of_turn>` also ends the text.
            is_cancelled: As for `generate`.
            **overrides: As for `generate`.

        Raises:
            RequestError: No messages, the last is the assistant's, and as for `generate`.
            TokenizerError: Messages that the chat template refuses.
        """
        options = ending_with_the_turn(_with_overrides(options, overrides), self.tokenizer)
        return self._stream(chat_prompt(self.tokenizer, messages), options, is_cancelled)

    def answer(
        self,
        chats: Sequence[Sequence[Message]],
        options: GenerationOptions | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        is_cancelled: Callable[[], bool] = never,
        **overrides: Any,
    ) -> list[GenerationResult]:
        """Answer several conversations, each as `chat` does, in batches as `generate` does."""
        options = ending_with_the_turn(_with_overrides(options, overrides), self.tokenizer)
        encoded = [chat_prompt(self.tokenizer, messages) for messages in chats]
        return list(self._results(encoded, options, batch_size, is_cancelled))

    def _results(
        self,
        prompts: list[Prompt],
        options: GenerationOptions,
        batch_size: int,
        is_cancelled: Callable[[], bool],
    ) -> Iterator[GenerationResult]:
        """Check everything at once; run a batch when its first result is asked for."""
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; it must be at least 1")
        batch_size = min(batch_size, self.session.limits.max_batch_size or batch_size)
        ids = [prompt.token_ids for prompt in prompts]
        capacity = self._runner.capacity(ids, options) if prompts else 0
        stops = self._stop_token_ids(options)

        def results() -> Iterator[GenerationResult]:
            is_interrupted = False
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                batch = self._runner.start(
                    ids[part], options, capacity, stop_token_ids=stops, first_row=start
                )
                is_interrupted |= self._runner.run(
                    batch, _always if is_interrupted else is_cancelled
                )
                for prompt, row in zip(prompts[part], batch.rows, strict=True):
                    yield _result(prompt, row, self._text_of(row))

        return results()

    def _stream(
        self, prompt: Prompt, options: GenerationOptions, is_cancelled: Callable[[], bool]
    ) -> TextStream:
        ids = [prompt.token_ids]
        capacity = self._runner.capacity(ids, options)
        stops = self._stop_token_ids(options)
        batch = self._runner.start(ids, options, capacity, stop_token_ids=stops)
        detokenizer = self.tokenizer.stream()
        return TextStream(
            batch.rows[0],
            self._runner.steps(batch, is_cancelled),
            push=lambda token_id: detokenizer.push(token_id) if self._has_text(token_id) else "",
            finish=detokenizer.finish,
            to_result=partial(_result, prompt),
        )

    def _stop_token_ids(self, options: GenerationOptions) -> frozenset[int]:
        model_stops = frozenset() if options.ignore_eos else self.eos_token_ids
        return model_stops | set(options.stop_token_ids)

    def _text_of(self, row: Row) -> str:
        # The token that ended the text is no part of it.
        tokens = row.new_tokens[:-1] if row.finish_reason == "stop" else row.new_tokens
        return self.tokenizer.decode([token for token in tokens if self._has_text(token)])

    def _has_text(self, token_id: int) -> bool:
        # Embeddings are often padded with rows that the tokenizer knows nothing of.
        return token_id < self.tokenizer.vocab_size


def _result(prompt: Prompt, row: Row, text: str) -> GenerationResult:
    return GenerationResult(
        prompt=prompt.text,
        text=text,
        prompt_token_ids=tuple(prompt.token_ids),
        token_ids=row.new_tokens,
        finish_reason=row.finish_reason or "cancelled",
        timings=row.timings(),
    )


def _always() -> bool:
    return True


def _with_overrides(
    options: GenerationOptions | None, overrides: Mapping[str, Any]
) -> GenerationOptions:
    known = {field.name for field in dataclasses.fields(GenerationOptions)}
    if unknown := overrides.keys() - known:
        raise RequestError(
            f"unknown option {', '.join(sorted(unknown))}; expected {', '.join(sorted(known))}"
        )
    return dataclasses.replace(options or GenerationOptions(), **overrides)

"""Prompts to text with a loaded model: `TextGenerator`."""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Self

from gemma_deploy.errors import GemmaDeployError, RequestError
from gemma_deploy.runtime.capacity import cache_capacity, check_max_seq_len, check_token_ids
from gemma_deploy.runtime.generator import PREFILL_CHUNK_TOKENS, BatchGeneration, never
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.result import GenerationResult
from gemma_deploy.runtime.rows import Row
from gemma_deploy.runtime.sessions.registry import create_session
from gemma_deploy.runtime.sessions.session import KVCache, Session
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.streaming import TextStream
from gemma_deploy.tokenizer import GemmaTokenizer

DEFAULT_BATCH_SIZE = 8
END_OF_TURN = "<end_of_turn>"


class TextGenerator:
    """A loaded model that continues prompts; a context manager that frees it.

    Calls share one KV cache: a new call cancels a stream that is still open, and threads must take
    turns.

    Attributes:
        session: What runs the steps.
        tokenizer: Text to token ids and back.
        max_seq_len: Most tokens of prompt and text together.
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
            RequestError: `max_seq_len` is beyond what the model is made for.
        """
        check_max_seq_len(max_seq_len, source.max_seq_len)
        self.session = session
        self.tokenizer = tokenizer
        self.config = source.config
        self.max_seq_len = max_seq_len or source.max_seq_len
        self.generation_config: Mapping[str, Any] = source.generation_config
        self.eos_token_ids = source.eos_token_ids
        self._limit = source.max_seq_len
        self._fixed_capacity = max_seq_len
        self._prefill_chunk = prefill_chunk
        self._cache: KVCache | None = None
        self._batch_in_cache: BatchGeneration | None = None

    @classmethod
    def open(
        cls,
        source: ModelSource,
        *,
        backend: str = "auto",
        device: str = "auto",
        max_seq_len: int | None = None,
        threads: int | None = None,
    ) -> "TextGenerator":
        """Load a model and its tokenizer; see `gemma_deploy.load`."""
        check_max_seq_len(max_seq_len, source.max_seq_len)
        tokenizer = GemmaTokenizer.from_pretrained(source.folder)
        session = create_session(source, backend=backend, device=device, threads=threads)
        return cls(session, tokenizer, source, max_seq_len=max_seq_len)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its KV cache; the generator cannot be used afterwards."""
        self._cache = self._batch_in_cache = None
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
            batch_size: Most prompts that run at a time; it changes speed and memory, not the text.
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
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; it must be at least 1")
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        options = _with_overrides(options, overrides)
        prompt_ids = [self._encode(number, text) for number, text in enumerate(texts)]
        capacity = self._capacity(prompt_ids, options) if texts else 0
        starts = range(0, len(texts), batch_size)

        def results() -> Iterator[GenerationResult]:
            is_interrupted = False
            for start in starts:
                batch = slice(start, start + batch_size)
                rows = self._batch(prompt_ids[batch], options, capacity, first_row=start)
                is_interrupted |= self._run(rows, _always if is_interrupted else is_cancelled)
                for text, row in zip(texts[batch], rows.rows, strict=True):
                    yield self._result(text, row, self._text_of(row))

        return results()

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
        return self._stream(prompt, self._encode(0, prompt), options, is_cancelled)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
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
            RequestError: No messages, and as for `generate`.
            TokenizerError: Messages that the chat template refuses.
        """
        if not messages:
            raise RequestError("the chat has no messages: give at least the user's first")
        options = _with_overrides(options, overrides)
        end_of_turn = self.tokenizer.token_to_id(END_OF_TURN)
        if end_of_turn is not None:
            stops = (*options.stop_token_ids, end_of_turn)
            options = dataclasses.replace(options, stop_token_ids=stops)
        prompt = self.tokenizer.apply_chat_template(messages)
        return self._stream(prompt, self.tokenizer.encode_chat(messages), options, is_cancelled)

    def _stream(
        self,
        prompt: str,
        prompt_ids: list[int],
        options: GenerationOptions,
        is_cancelled: Callable[[], bool],
    ) -> TextStream:
        batch = self._batch([prompt_ids], options, self._capacity([prompt_ids], options))
        detokenizer = self.tokenizer.stream()
        return TextStream(
            batch.rows[0],
            self._steps(batch, is_cancelled),
            push=lambda token_id: detokenizer.push(token_id) if self._has_text(token_id) else "",
            finish=detokenizer.finish,
            to_result=lambda row, text: self._result(prompt, row, text),
        )

    def _encode(self, number: int, prompt: str) -> list[int]:
        if not prompt:
            raise RequestError(f"prompt {number} is empty: give at least one character")
        return self.tokenizer.encode(prompt)

    def _capacity(self, prompts: list[list[int]], options: GenerationOptions) -> int:
        check_token_ids(prompts, self.config.vocab_size)
        return cache_capacity(
            prompts, options.max_new_tokens, max_seq_len=self._fixed_capacity, limit=self._limit
        )

    def _batch(
        self,
        prompts: list[list[int]],
        options: GenerationOptions,
        capacity: int,
        first_row: int = 0,
    ) -> BatchGeneration:
        if self._batch_in_cache is not None:
            self._batch_in_cache.cancel()
        model_stops = frozenset() if options.ignore_eos else self.eos_token_ids
        self._batch_in_cache = BatchGeneration(
            self.session,
            self._cache_for(len(prompts), capacity),
            prompts,
            options,
            stop_token_ids=model_stops | set(options.stop_token_ids),
            first_row=first_row,
            prefill_chunk=self._prefill_chunk,
        )
        return self._batch_in_cache

    def _cache_for(self, batch_size: int, capacity: int) -> KVCache:
        """Return rows of the cache of earlier calls where they suffice, of a new one otherwise."""
        cache = self._cache
        if cache is None or cache.batch_size < batch_size or cache.max_seq_len < capacity:
            self._cache = self._batch_in_cache = None  # freed before its successor is allocated
            self._cache = cache = self.session.new_cache(batch_size, capacity)
        return cache.rows(0, batch_size)

    def _run(self, batch: BatchGeneration, is_cancelled: Callable[[], bool]) -> bool:
        """Run a batch to its end; return whether it was cancelled."""
        try:
            for _ in self._steps(batch, is_cancelled):
                pass
        except KeyboardInterrupt:
            batch.cancel()
        return any(row.finish_reason == "cancelled" for row in batch.rows)

    def _steps(
        self, batch: BatchGeneration, is_cancelled: Callable[[], bool]
    ) -> Generator[list[int]]:
        try:
            yield from batch.steps(is_cancelled)
        except GemmaDeployError:
            # The step may have left NaN in the cache: a masked position's zero weight times NaN is NaN.
            self._cache = None
            raise

    def _text_of(self, row: Row) -> str:
        # The token that ended the text is no part of it.
        tokens = row.new_tokens[:-1] if row.finish_reason == "stop" else row.new_tokens
        return self.tokenizer.decode([token for token in tokens if self._has_text(token)])

    def _has_text(self, token_id: int) -> bool:
        # Embeddings are often padded with rows that the tokenizer knows nothing of.
        return token_id < self.tokenizer.vocab_size

    def _result(self, prompt: str, row: Row, text: str) -> GenerationResult:
        return GenerationResult(
            prompt=prompt,
            text=text,
            prompt_token_ids=tuple(row.sequence[: row.prompt_length].tolist()),
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

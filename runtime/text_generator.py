"""Prompts to text with a loaded model: `TextGenerator`."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from gemma_deploy.errors import RequestError
from gemma_deploy.quoting import shortened
from gemma_deploy.runtime.batch_runner import BatchRunner, OnProgress, ignore
from gemma_deploy.runtime.capacity import check_max_seq_len
from gemma_deploy.runtime.generator import PREFILL_CHUNK_TOKENS, never
from gemma_deploy.runtime.opening import open_model
from gemma_deploy.runtime.prompt_runner import PromptRunner
from gemma_deploy.runtime.prompts import (
    Message,
    Prompt,
    Tools,
    chat_prompt,
    check_answerable,
    text_prompts,
)
from gemma_deploy.runtime.request import GenerationOptions, whole_number, with_overrides
from gemma_deploy.runtime.result import GenerationResult
from gemma_deploy.runtime.sessions.session import Session
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.streaming import TextStream
from gemma_deploy.tokenizer import GemmaTokenizer

DEFAULT_BATCH_SIZE = 8


class TextGenerator:
    """A loaded model that continues prompts; a context manager that frees it.

    Safe to use from several threads: a call waits until another's batch, or the step of another's
    stream, has ended. Streams hold the model only while they compute a token, so several may be open,
    a slow reader stalls nobody, and each piece may be asked for by another thread. Nobody's text
    depends on what others do. Each open stream has a KV cache of its own.

    Attributes:
        session: What runs the steps; not to be run by others while the generator does.
        tokenizer: Text to token ids and back.
        source: Where the model was loaded from.
        config: The model.
        max_seq_len: Most tokens in the KV cache: the prompt's and the text's but the last, which
            needs no place there.
        generation_config: Contents of the model's generation_config.json.
        generation_defaults: What of it is honoured; see `GenerationOptions`.
        prompt_runner: What runs prompts that are encoded already.
        eos_token_ids: The tokens that end a text by the model's own account: config.json's,
            generation_config.json's, the tokenizer's, and the end of a turn if the checkpoint has a
            chat template.
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
            ConfigError: generation_config.json holds what no model can have.
        """
        limit = min(source.max_seq_len, session.limits.max_seq_len or source.max_seq_len)
        check_max_seq_len(max_seq_len, limit)
        prefill_chunk = whole_number("prefill_chunk", prefill_chunk, 1)
        self.session = session
        self.source = source
        self.config = source.config
        self.max_seq_len = max_seq_len or limit
        self.generation_config: Mapping[str, Any] = source.generation_config
        self.generation_defaults = source.generation_defaults()
        self.generation_defaults.warn_of_ignored(source.generation_place)
        self._batches = BatchRunner(
            session, max_seq_len=max_seq_len, limit=limit, prefill_chunk=prefill_chunk
        )
        self._take(tokenizer)

    @classmethod
    def open(
        cls,
        source: ModelSource,
        *,
        max_seq_len: int | None = None,
        **session_options: Any,
    ) -> "TextGenerator":
        """Load a model and its tokenizer; see `gemma_deploy.load`.

        Args:
            source: The model.
            max_seq_len: Capacity of the KV cache, in tokens; None for what each call needs.
            **session_options: Keyword arguments of `open_model`.
        """
        check_max_seq_len(max_seq_len, source.max_seq_len)
        source.generation_defaults()  # before a large model is loaded
        session, tokenizer = open_model(source, max_seq_len=max_seq_len, **session_options)
        try:
            return cls(session, tokenizer, source, max_seq_len=max_seq_len)
        except BaseException:
            session.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its KV caches; the generator cannot be used afterwards.

        A step of another thread is waited for; the next one is a SessionError there.
        """
        self._batches.close()

    def with_tokenizer(self, tokenizer: GemmaTokenizer) -> Self:
        """Return a generator on the same loaded model that encodes and decodes with another tokenizer."""
        other = copy.copy(self)
        other._take(tokenizer)
        return other

    def generate(
        self,
        prompts: str | Sequence[str],
        options: GenerationOptions | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        allow_special: bool = True,
        is_cancelled: Callable[[], bool] = never,
        on_progress: OnProgress = ignore,
        **overrides: Any,
    ) -> list[GenerationResult]:
        """Continue each prompt.

        Ctrl-C ends the call, not the program: what was generated is returned, rows that had not ended
        say `cancelled`. Other threads wait while a batch runs.

        Args:
            prompts: One prompt or several; an empty one starts from `<bos>`.
            options: How to choose tokens and when to stop; None, and each field that is None, for what
                the model's generation_config.json says, else for greedy decoding of 256 tokens.
            batch_size: Most prompts that run at a time, where the session takes as many; it changes
                speed and memory, and the text by no more than the rounding of the kernels: in 16 bits
                a near tie may fall the other way.
            allow_special: Whether control tokens that a prompt spells (`<end_of_turn>`) become these
                tokens. False is for prompts that hold other people's words.
            is_cancelled: Asked before each step; True ends the call as Ctrl-C does.
            on_progress: Called while prompts are read, with the tokens of the running batch's prompts
                that are read and with how many there are.
            **overrides: Fields of `GenerationOptions` that replace those of `options`.

        Returns:
            One result for each prompt, in their order.

        Raises:
            RequestError: Prompts that are no strings, token ids the model does not have, bad options.
            PromptTooLongError: A prompt that does not fit the KV cache; nothing has run then.
            NonFiniteLogitsError: The model put out NaN or infinity.
            SessionError: The backend failed, or the generator was closed.
        """
        results = self.generate_each(
            prompts,
            options,
            batch_size=batch_size,
            allow_special=allow_special,
            is_cancelled=is_cancelled,
            on_progress=on_progress,
            **overrides,
        )
        return list(results)

    def generate_each(
        self,
        prompts: str | Sequence[str],
        options: GenerationOptions | None = None,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        allow_special: bool = True,
        is_cancelled: Callable[[], bool] = never,
        on_progress: OnProgress = ignore,
        **overrides: Any,
    ) -> Iterator[GenerationResult]:
        """Yield what `generate` returns, each batch as soon as it is done.

        All prompts are checked at once; the model first runs when a result is asked for.
        """
        return self.prompt_runner.results(
            text_prompts(self.tokenizer, prompts, allow_special=allow_special),
            self.resolved_options(options, **overrides),
            batch_size=batch_size,
            is_cancelled=is_cancelled,
            on_progress=on_progress,
        )

    def stream(
        self,
        prompt: str,
        options: GenerationOptions | None = None,
        *,
        allow_special: bool = True,
        is_cancelled: Callable[[], bool] = never,
        on_progress: OnProgress = ignore,
        **overrides: Any,
    ) -> TextStream:
        """Continue one prompt and yield its text as it comes; see `generate`.

        The prompt is checked at once; the model first runs when the stream is asked for a piece.
        """
        (encoded,) = text_prompts(self.tokenizer, [prompt], allow_special=allow_special)
        options = self.resolved_options(options, **overrides)
        return self.prompt_runner.stream(
            encoded, options, is_cancelled=is_cancelled, on_progress=on_progress
        )

    def chat(
        self,
        messages: Sequence[Message],
        options: GenerationOptions | None = None,
        *,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        is_cancelled: Callable[[], bool] = never,
        on_progress: OnProgress = ignore,
        **overrides: Any,
    ) -> TextStream:
        """Answer the last message of a conversation and yield the answer as it comes.

        Args:
            messages: Each with `role` and `content`, the user's last; the caller keeps the history.
            options: As for `generate`; the end of the template's turn also ends the text.
            tools: JSON schemas of functions, for a chat template that knows tools.
            continue_final_message: Whether to go on with the last message, the beginning of an answer,
                instead; what is yielded comes behind it.
            is_cancelled: As for `generate`.
            on_progress: As for `generate`.
            **overrides: As for `generate`.

        Raises:
            RequestError: No messages, the last is the assistant's, and as for `generate`.
            TokenizerError: Messages that the chat template refuses.
        """
        (encoded,) = self._chat_prompts([messages], tools, is_continued=continue_final_message)
        options = self.resolved_options(options, **overrides)
        return self.prompt_runner.stream(
            encoded, options, is_cancelled=is_cancelled, on_progress=on_progress
        )

    def answer(
        self,
        chats: Sequence[Sequence[Message]],
        options: GenerationOptions | None = None,
        *,
        tools: Tools | None = None,
        continue_final_message: bool = False,
        batch_size: int = DEFAULT_BATCH_SIZE,
        is_cancelled: Callable[[], bool] = never,
        on_progress: OnProgress = ignore,
        **overrides: Any,
    ) -> list[GenerationResult]:
        """Answer several conversations, each as `chat` does, in batches as `generate` does."""
        results = self.prompt_runner.results(
            self._chat_prompts(chats, tools, is_continued=continue_final_message),
            self.resolved_options(options, **overrides),
            batch_size=batch_size,
            is_cancelled=is_cancelled,
            on_progress=on_progress,
        )
        return list(results)

    def resolved_options(
        self, options: GenerationOptions | None = None, **overrides: Any
    ) -> GenerationOptions:
        """Return what a call with these options does, once generation_config.json is looked into."""
        return self.generation_defaults.over(with_overrides(options, overrides))

    def _take(self, tokenizer: GemmaTokenizer) -> None:
        self.tokenizer = tokenizer
        self.prompt_runner = PromptRunner(self._batches, tokenizer, self.source.eos_token_ids)
        self.eos_token_ids = self.prompt_runner.eos_token_ids

    def _chat_prompts(
        self, chats: Sequence[Sequence[Message]], tools: Tools | None, *, is_continued: bool
    ) -> list[Prompt]:
        if isinstance(chats, str | bytes | Mapping) or not isinstance(chats, Iterable):
            raise RequestError(
                f"the chats are {shortened(chats)} ({type(chats).__name__}); expected a list of lists of "
                "messages"
            )
        listed = list(chats)
        if not is_continued:
            for messages in listed:
                check_answerable(messages)
        return [
            chat_prompt(self.tokenizer, messages, tools=tools, continue_final_message=is_continued)
            for messages in listed
        ]

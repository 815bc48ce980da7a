"""transformers' text generation pipeline on a `TextGenerator`: `TextGenerationPipeline`."""

import dataclasses
from typing import Any, Self

from gemma_deploy.runtime.batch_runner import ignore
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.generator import never
from gemma_deploy.runtime.pipeline_inputs import PipelineInputs, TextInputs, read_inputs
from gemma_deploy.runtime.pipeline_settings import (
    PipelineSettings,
    check_keywords,
    merged,
    without_nones,
)
from gemma_deploy.runtime.prompts import Prompt, chat_prompt, ends_with_the_assistant, text_prompts
from gemma_deploy.runtime.result import GenerationResult
from gemma_deploy.runtime.text_generator import TextGenerator
from gemma_deploy.tokenizer import GemmaTokenizer


class TextGenerationPipeline:
    """Called with text, gives transformers' `[{"generated_text": ...}]`.

    https://huggingface.co/docs/transformers/main_classes/pipelines#transformers.TextGenerationPipeline

    What transformers' has and this one has not: keyword arguments that are not named below (beam
    search, `stop_strings`, a `GenerationConfig`, ...) are refused instead of passed on; an iterator of
    inputs gives a list once all are done, not an iterator; a `max_length` of the call wins over
    `max_new_tokens` of generation_config.json. `seed` is an addition, where transformers has a global
    one, and random texts are other ones than its.

    Args:
        generator: The loaded model; the pipeline closes it.
        **defaults: Keyword arguments of every call, unless the call gives its own.

    Attributes:
        generator: The loaded model.

    Raises:
        RequestError: An unknown keyword argument.
    """

    task = "text-generation"

    def __init__(self, generator: TextGenerator, **defaults: Any) -> None:
        check_keywords(defaults)
        self.generator = generator
        self._defaults = without_nones(defaults)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.generator.close()

    @property
    def model(self) -> TextGenerator:
        """The loaded model, by transformers' name."""
        return self.generator

    @property
    def tokenizer(self) -> GemmaTokenizer:
        """What encodes prompts and decodes texts."""
        return self.generator.tokenizer

    @property
    def device(self) -> Device:
        """What the model runs on."""
        return self.generator.session.device

    def __call__(self, text_inputs: TextInputs, **kwargs: Any) -> list[Any]:
        """Continue texts, or answer chats.

        Args:
            text_inputs: A text (an empty one starts from `<bos>`), a list of texts, a chat (list of
                messages with `role` and `content`), or a list of chats; any iterable is as good as a
                list. A chat that ends with the assistant's message has that message continued.
            **kwargs: `max_new_tokens`, `max_length` (prompt included), `do_sample`, `temperature`,
                `top_k`, `top_p`, `repetition_penalty` as in transformers (generation_config.json, then
                transformers' pipeline defaults, stand in for what is not given); `return_full_text`
                (True: the prompt precedes the text; for a chat, the messages precede the answer),
                `return_tensors` (token ids as `generated_token_ids`, a list), `skip_special_tokens`,
                `num_return_sequences`, `batch_size`, `eos_token_id` (one or a list, instead of the
                model's own), `truncation` (of prompts, to `max_length`), `continue_final_message` and
                `tools` for chats, `seed`. None switches `temperature`, `top_k`, `top_p` or
                `repetition_penalty` off, as 0 does `top_k`; of the others it means not given. Fields of
                a `GenerationConfig` on which no text depends are accepted without effect.

        Returns:
            For one text or chat a list of `num_return_sequences` dicts with `generated_text`: a str,
            for a chat with `return_full_text` the list of messages. For a list of inputs a list of
            such lists.

        Raises:
            RequestError: An unknown keyword argument, inputs of another type, or as
                `TextGenerator.generate`.
            TokenizerError: As `TextGenerator.chat`.
        """
        check_keywords(kwargs)
        given = merged(self._defaults, without_nones(kwargs))
        settings = PipelineSettings.read(given, self.generator.generation_defaults)
        inputs = read_inputs(text_inputs)
        count = settings.num_return_sequences
        results = self.generator.prompt_runner.results(
            [prompt for prompt in self._prompts(inputs, settings) for _ in range(count)],
            settings.options,
            batch_size=settings.batch_size,
            is_cancelled=never,
            on_progress=ignore,
        )
        outputs = [
            [self._record(one, next(results), settings) for _ in range(count)]
            for one in inputs.items
        ]
        return outputs if inputs.is_batch else outputs[0]

    def _prompts(self, inputs: PipelineInputs, settings: PipelineSettings) -> list[Prompt]:
        if inputs.are_chats:
            prompts = [
                chat_prompt(
                    self.tokenizer,
                    messages,
                    tools=settings.tools,
                    continue_final_message=_is_continued(messages, settings),
                )
                for messages in inputs.items
            ]
        else:
            prompts = text_prompts(self.tokenizer, inputs.items)
        most = settings.max_prompt_tokens
        return [dataclasses.replace(one, token_ids=one.token_ids[:most]) for one in prompts]

    def _record(
        self, one: Any, result: GenerationResult, settings: PipelineSettings
    ) -> dict[str, Any]:
        """Return what is given back for a text or a chat."""
        if settings.returns == "tokens":
            return {"generated_token_ids": [*result.prompt_token_ids, *result.token_ids]}
        text = result.text
        if settings.shows_eos:
            text = self.generator.prompt_runner.decode(
                result.token_ids, skip_special_tokens=settings.skip_special_tokens
            )
        if settings.returns == "new":
            return {"generated_text": text}
        if isinstance(one, str):
            return {"generated_text": one + text}
        if _is_continued(one, settings):
            return {"generated_text": [*one[:-1], _continued(one[-1], text)]}
        return {"generated_text": [*one, {"role": "assistant", "content": text}]}


def _is_continued(messages: list[Any], settings: PipelineSettings) -> bool:
    if settings.continue_final_message is None:
        return ends_with_the_assistant(messages)
    return settings.continue_final_message


def _continued(message: Any, text: str) -> dict[str, Any]:
    """Return a message with text behind its own, which is a string or parts that end with text."""
    content = message["content"]
    if isinstance(content, str) or not content:
        return {"role": message["role"], "content": (content or "") + text}
    *parts, last = content
    return {"role": message["role"], "content": [*parts, {**last, "text": last["text"] + text}]}

"""transformers' text generation pipeline on a `TextGenerator`: `TextGenerationPipeline`."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.prompts import Message
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.result import GenerationResult
from gemma_deploy.runtime.text_generator import DEFAULT_BATCH_SIZE, TextGenerator

TextInputs = str | Iterable[str] | Iterable[Message] | Iterable[Iterable[Message]]

# transformers' own, for what neither the call nor generation_config.json says.
_PIPELINE_DEFAULTS: Mapping[str, Any] = {
    "max_new_tokens": 256,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 50,
}
_OFF: Mapping[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
_SAMPLING = ("temperature", "top_k", "top_p")
_FROM_GENERATION_CONFIG = ("max_new_tokens", "do_sample", *_SAMPLING, "repetition_penalty")
_CALL_ONLY = (
    "batch_size",
    "eos_token_id",
    "num_return_sequences",
    "pad_token_id",
    "return_full_text",
    "seed",
)


class TextGenerationPipeline:
    """Called with text, gives transformers' `[{"generated_text": ...}]`.

    https://huggingface.co/docs/transformers/main_classes/pipelines#transformers.TextGenerationPipeline

    What transformers' has and this one has not: keyword arguments that are not named below (beam
    search, `max_length`, `stop_strings`, `return_tensors`, a `GenerationConfig`, ...) are refused
    instead of passed on; a chat that ends with the assistant's message is refused instead of
    continued; an iterator of inputs gives a list once all are done, not an iterator. `seed` is an
    addition, where transformers has a global one, and random texts are other ones than its.

    Args:
        generator: The loaded model; the pipeline closes it.
        **defaults: Keyword arguments of every call, unless the call gives its own.

    Raises:
        RequestError: An unknown keyword argument.
    """

    task = "text-generation"

    def __init__(self, generator: TextGenerator, **defaults: Any) -> None:
        check_keywords(defaults)
        self.generator = generator
        self._defaults = _without_nones(defaults)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.generator.close()

    def __call__(self, text_inputs: TextInputs, **kwargs: Any) -> list[Any]:
        """Continue texts, or answer chats.

        Args:
            text_inputs: A text, a list of texts, a chat (list of messages with `role` and `content`),
                or a list of chats; any iterable is as good as a list.
            **kwargs: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`,
                `repetition_penalty` as in transformers (generation_config.json, then transformers'
                pipeline defaults, stand in for what is not given); `return_full_text` (True: the
                prompt precedes the text; for a chat, the messages precede the answer),
                `num_return_sequences`, `batch_size`, `eos_token_id` (one or a list, instead of the
                model's own), `pad_token_id` (no text depends on it), `seed`. None switches
                `temperature`, `top_k`, `top_p` or `repetition_penalty` off, as 0 does `top_k`; of
                the others it means not given.

        Returns:
            For one text or chat a list of `num_return_sequences` dicts with `generated_text`: a str,
            for a chat with `return_full_text` the list of messages. For a list of inputs a list of
            such lists.

        Raises:
            RequestError: An unknown keyword argument, or as `TextGenerator.generate`.
        """
        check_keywords(kwargs)
        settings = {**self._defaults, **_without_nones(kwargs)}
        count = settings.get("num_return_sequences", 1)
        options = self._options(settings)
        if count < 1 or (count > 1 and options.is_greedy):
            raise RequestError(
                f"num_return_sequences is {count}; it must be at least 1, and 1 with greedy decoding, "
                "which has only one outcome: set do_sample=True"
            )
        given = _as_lists(text_inputs)
        is_batch = isinstance(given, list) and not _is_chat(given)
        inputs: list[Any] = given if is_batch else [given]
        results = self._generate(
            [one for one in inputs for _ in range(count)],
            options,
            settings.get("batch_size", DEFAULT_BATCH_SIZE),
        )
        is_full = settings.get("return_full_text", True)
        outputs = [
            [
                {"generated_text": _generated(one, result, is_full=is_full)}
                for result in results[index * count : (index + 1) * count]
            ]
            for index, one in enumerate(inputs)
        ]
        return outputs if is_batch else outputs[0]

    def _generate(
        self, inputs: list[Any], options: GenerationOptions, batch_size: int
    ) -> list[GenerationResult]:
        if all(isinstance(one, str) for one in inputs):
            return self.generator.generate(inputs, options, batch_size=batch_size)
        if all(_is_chat(one) for one in inputs):
            return self.generator.answer(inputs, options, batch_size=batch_size)
        raise RequestError(
            "text_inputs mixes texts and chats, or holds neither; expected a text, a list of texts, "
            "a list of messages with role and content, or a list of such lists"
        )

    def _options(self, settings: Mapping[str, Any]) -> GenerationOptions:
        file = self.generator.generation_config
        stated = {key: file[key] for key in _FROM_GENERATION_CONFIG if file.get(key) is not None}
        values = {**_PIPELINE_DEFAULTS, **stated, **settings}
        sampling = {key: values[key] for key in _SAMPLING if key in values}
        sampling["top_k"] = sampling["top_k"] or None
        if not values["do_sample"]:
            sampling = {"temperature": 0.0}
        elif sampling["temperature"] == 0:
            raise RequestError(
                "temperature is 0 with do_sample=True: set do_sample=False for greedy"
            )
        eos = values.get("eos_token_id")
        return GenerationOptions(
            max_new_tokens=values["max_new_tokens"],
            repetition_penalty=values.get("repetition_penalty", 1.0),
            seed=values.get("seed"),
            stop_token_ids=() if eos is None else tuple([eos] if isinstance(eos, int) else eos),
            ignore_eos=eos is not None,
            **sampling,
        )


def check_keywords(kwargs: Mapping[str, Any]) -> None:
    """Refuse what neither the pipeline nor its calls know.

    Raises:
        RequestError: Naming the unknown keyword arguments and the known ones.
    """
    known = {*_FROM_GENERATION_CONFIG, *_CALL_ONLY}
    if unknown := kwargs.keys() - known:
        raise RequestError(
            f"unknown keyword argument {', '.join(sorted(unknown))}; the pipeline knows "
            f"{', '.join(sorted(known))}"
        )


def _without_nones(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with what None stands for, or without them."""
    off = {key: _OFF[key] for key, value in settings.items() if value is None and key in _OFF}
    return {key: value for key, value in settings.items() if value is not None} | off


def _as_lists(text_inputs: Any) -> Any:
    """Return the inputs with every iterable that can be read only once made a list."""
    if isinstance(text_inputs, str | Mapping):
        return text_inputs
    return [one if isinstance(one, str | Mapping) else list(one) for one in text_inputs]


def _is_chat(one: Any) -> bool:
    is_list = isinstance(one, list) and bool(one)
    return is_list and all(isinstance(message, Mapping) for message in one)


def _generated(one: Any, result: GenerationResult, *, is_full: bool) -> Any:
    if not is_full:
        return result.text
    if isinstance(one, str):
        return one + result.text
    return [*one, {"role": "assistant", "content": result.text}]

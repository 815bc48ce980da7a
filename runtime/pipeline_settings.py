"""The pipeline's keyword arguments: `PipelineSettings`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from gemma_deploy.errors import RequestError
from gemma_deploy.quoting import shortened
from gemma_deploy.runtime.generation_config import (
    FIELDS_WITHOUT_EFFECT,
    NEUTRAL_VALUES,
    GenerationDefaults,
    changes_text,
    eos_token_ids,
)
from gemma_deploy.runtime.prompts import Tools
from gemma_deploy.runtime.request import GenerationOptions, whole_number
from gemma_deploy.runtime.text_generator import DEFAULT_BATCH_SIZE

# transformers' own, for what neither the call nor generation_config.json says.
_DEFAULTS: Final[Mapping[str, Any]] = {"temperature": 0.7, "top_k": 50, "top_p": 1.0}
# What None switches off. Of the other keyword arguments it means not given.
_OFF: Final[Mapping[str, Any]] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}
_KNOWN: Final = frozenset(
    """
    max_new_tokens max_length do_sample temperature top_k top_p repetition_penalty eos_token_id seed
    num_return_sequences batch_size return_full_text return_text return_tensors skip_special_tokens
    clean_up_tokenization_spaces truncation continue_final_message tools
    """.split()  # noqa: SIM905 - a literal would take a line for each
)
_RETURNS: Final = ("return_full_text", "return_tensors", "return_text")
_TRUNCATION: Final = (None, False, True, "do_not_truncate", "longest_first", "only_first")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings:
    """What a call asks for.

    Attributes:
        options: How to choose tokens and when to stop.
        num_return_sequences: Texts for each input.
        batch_size: Most prompts that run at a time.
        returns: `full` (prompt and text), `new` (the text) or `tokens` (the ids of both).
        skip_special_tokens: Whether texts leave special tokens out.
        shows_eos: Whether a token that ended a text is in it where it is not special, as in
            transformers: where the caller said which tokens these are.
        max_prompt_tokens: Where prompts are cut; None for nowhere.
        continue_final_message: Whether a chat's last message is gone on with; None where it is the
            assistant's.
        tools: For the chat template.
    """

    options: GenerationOptions
    num_return_sequences: int
    batch_size: int
    returns: Literal["full", "new", "tokens"]
    skip_special_tokens: bool
    shows_eos: bool
    max_prompt_tokens: int | None
    continue_final_message: bool | None
    tools: Tools | None

    @classmethod
    def read(cls, given: Mapping[str, Any], defaults: GenerationDefaults) -> "PipelineSettings":
        """Read keyword arguments.

        Args:
            given: From `without_nones`.
            defaults: What the model's generation_config.json says.

        Raises:
            RequestError: A value that cannot be, or values that contradict each other.
        """
        for name in (
            "do_sample",
            "return_full_text",
            "return_text",
            "return_tensors",
            "skip_special_tokens",
            "continue_final_message",
        ):
            if not isinstance(given.get(name), bool | None):
                raise RequestError(f"{name} is {shortened(given[name])}; expected True or False")
        options = _options(given, defaults)
        count = whole_number("num_return_sequences", given.get("num_return_sequences", 1), 1)
        if count > 1 and options.is_greedy:
            raise RequestError(
                f"num_return_sequences is {count}; it must be 1 with greedy decoding, which has only "
                "one outcome: set do_sample=True"
            )
        skips = given.get("skip_special_tokens", True)
        return cls(
            options=options,
            num_return_sequences=count,
            batch_size=given.get("batch_size", DEFAULT_BATCH_SIZE),
            returns=_returns(given),
            skip_special_tokens=skips,
            shows_eos=not skips or "eos_token_id" in given,
            max_prompt_tokens=_max_prompt_tokens(given),
            continue_final_message=given.get("continue_final_message"),
            tools=given.get("tools"),
        )


def check_keywords(kwargs: Mapping[str, Any]) -> None:
    """Refuse what neither the pipeline nor its calls know.

    Raises:
        RequestError: Naming the keyword arguments and, if they are unknown, the known ones.
    """
    if kwargs.get("clean_up_tokenization_spaces"):
        raise RequestError(
            "clean_up_tokenization_spaces is True, which would change the text: Gemma's tokens spell "
            "their spaces. Leave it out"
        )
    for name, value in kwargs.items():
        if name in NEUTRAL_VALUES.keys() - _KNOWN and changes_text(name, value):
            raise RequestError(
                f"{name} is {shortened(value)}, which is not implemented: the text would not be what it asks "
                "for. Leave it out"
            )
    if unknown := kwargs.keys() - _KNOWN - FIELDS_WITHOUT_EFFECT - NEUTRAL_VALUES.keys():
        raise RequestError(
            f"unknown keyword argument {', '.join(sorted(unknown))}; the pipeline knows "
            f"{', '.join(sorted(_KNOWN))}"
        )


def merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's settings over the pipeline's; one that says what is returned replaces all such."""
    replaced = _RETURNS if any(name in given for name in _RETURNS) else ()
    return {k: v for k, v in defaults.items() if k not in replaced} | dict(given)


def without_nones(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with what None stands for, or without them."""
    off = {key: _OFF[key] for key, value in settings.items() if value is None and key in _OFF}
    return {key: value for key, value in settings.items() if value is not None} | off


def _options(given: Mapping[str, Any], defaults: GenerationDefaults) -> GenerationOptions:
    do_sample = given.get("do_sample", defaults.do_sample is not False)
    sampling: dict[str, Any] = {"temperature": 0.0}
    if do_sample:
        stated = {name: getattr(defaults.options, name) for name in _DEFAULTS}
        sampling = {**_DEFAULTS, **{k: v for k, v in stated.items() if v is not None}}
        sampling |= {name: given[name] for name in _DEFAULTS if name in given}
        if sampling["temperature"] == 0:
            raise RequestError(
                "temperature is 0 with do_sample=True: set do_sample=False for greedy"
            )
    is_own = "eos_token_id" in given
    options = GenerationOptions(
        max_new_tokens=given.get("max_new_tokens"),
        max_length=given.get("max_length"),
        repetition_penalty=given.get("repetition_penalty"),
        seed=given.get("seed"),
        stop_token_ids=tuple(eos_token_ids(given["eos_token_id"])) if is_own else (),
        ignore_eos=is_own,
        **sampling,
    )
    return defaults.over(options)


def _returns(given: Mapping[str, Any]) -> Literal["full", "new", "tokens"]:
    if len(several := [name for name in _RETURNS if name in given]) > 1:
        raise RequestError(
            f"{' and '.join(several)} were given; each says what is returned: give one of them"
        )
    if given.get("return_tensors"):
        return "tokens"
    return "full" if given.get("return_full_text", True) else "new"


def _max_prompt_tokens(given: Mapping[str, Any]) -> int | None:
    truncation = given.get("truncation")
    if truncation not in _TRUNCATION:
        raise RequestError(f"truncation is {shortened(truncation)}; expected True or False")
    if truncation in (None, False, "do_not_truncate"):
        return None
    if "max_length" not in given:
        raise RequestError("truncation needs max_length: the tokens that are kept of a prompt")
    return whole_number("max_length", given["max_length"], 1)

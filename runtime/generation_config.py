"""What a model's generation_config.json says of the choice of tokens: `GenerationDefaults`.

The fields are those of transformers' `GenerationConfig`
(https://huggingface.co/docs/transformers/main_classes/text_generation).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from gemma_deploy.errors import ConfigError, RequestError, warn
from gemma_deploy.limits import MAX_TOKEN_ID
from gemma_deploy.quoting import shortened
from gemma_deploy.runtime.request import GenerationOptions, as_int

# What transformers' `generate` takes where do_sample is true and the file has no top_k.
_TOP_K_WHEN_SAMPLING: Final = 50

_OPTION_FIELDS: Final = (
    "max_new_tokens",
    "max_length",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
)
_COLDEST: Final = 1e-4  # below it all but the likeliest token is out of reach
_SAMPLING_FIELDS: Final = frozenset({"temperature", "top_k", "top_p"})
HONOURED_FIELDS: Final = frozenset({*_OPTION_FIELDS, "do_sample", "eos_token_id"})

# No text depends on them: memory and speed (drafted tokens are checked, so they change none), what
# else is returned, beam search without beams, models with an encoder, special tokens that the tokenizer
# names too, where the file comes from.
FIELDS_WITHOUT_EFFECT: Final = frozenset(
    """
    use_cache cache_implementation cache_config max_cache_len prefill_chunk_size compile_config
    disable_compile continuous_batching_config low_memory
    use_mtp is_assistant num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind
    assistant_ensemble_weight speculation_type prompt_lookup_num_tokens max_matching_ngram_size
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
    early_stopping length_penalty diversity_penalty renormalize_logits remove_invalid_values
    decoder_start_token_id
    pad_token_id bos_token_id transformers_version
    """.split()  # noqa: SIM905 - a literal would take a line for each
)

# These change the text and are not implemented; the values with which they would not.
NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "min_length": (0,),
        "min_new_tokens": (0,),
        "max_time": (),
        "stop_strings": ("", []),
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "num_return_sequences": (1,),
        "min_p": (0,),
        "top_h": (),
        "typical_p": (1,),
        "epsilon_cutoff": (0,),
        "eta_cutoff": (0,),
        "no_repeat_ngram_size": (0,),
        "encoder_repetition_penalty": (1,),
        "encoder_no_repeat_ngram_size": (0,),
        "bad_words_ids": ([],),
        "force_words_ids": ([],),
        "constraints": ([],),
        "forced_bos_token_id": (),
        "forced_eos_token_id": (),
        "exponential_decay_length_penalty": (),
        "suppress_tokens": ([],),
        "begin_suppress_tokens": ([],),
        "sequence_bias": ([], {}),
        "token_healing": (False,),
        "guidance_scale": (1,),
        "watermarking_config": (),
        "penalty_alpha": (0,),
        "dola_layers": (),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a generation_config.json asks for; a call's own options win over it.

    Attributes:
        options: The options it states; None where it does not.
        do_sample: Whether it says to sample; None if it does not say.
        eos_token_ids: Tokens that end a text.
        ignored: `name=value` of the fields that change text and are not implemented, or not known.
    """

    options: GenerationOptions = field(default_factory=GenerationOptions)
    do_sample: bool | None = None
    eos_token_ids: frozenset[int] = frozenset()
    ignored: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: Mapping[str, Any], place: str) -> "GenerationDefaults":
        """Read the contents of a generation_config.json; null is a field not given.

        Args:
            raw: The JSON object.
            place: What errors call the file.

        Raises:
            ConfigError: A field that is honoured has a value of another type or out of range.
        """
        given = {name: value for name, value in raw.items() if value is not None}
        do_sample = given.get("do_sample")
        if not isinstance(do_sample, bool | None):
            raise ConfigError(
                f"{place}: do_sample is {shortened(do_sample)} ({type(do_sample).__name__}); expected true or "
                "false: correct the file"
            )
        stated: dict[str, Any] = {}
        ignored = {name for name, value in given.items() if changes_text(name, value)}
        try:
            for name in given.keys() & set(_OPTION_FIELDS):
                value = _number(given[name])
                if not do_sample and _is_out_of_range(name, value):
                    ignored.add(name)  # greedy decoding never reads it
                else:
                    stated[name] = value
            options = GenerationOptions(**_as_transformers_samples(stated))
            eos_ids = eos_token_ids(given.get("eos_token_id"))
        except RequestError as err:
            raise ConfigError(f"{place}: {err}: correct the file") from err
        return cls(
            options=options,
            do_sample=do_sample,
            eos_token_ids=eos_ids,
            ignored=tuple(
                f"{name}={shortened(given[name], 60)}" for name in given if name in ignored
            ),
        )

    def over(self, options: GenerationOptions) -> GenerationOptions:
        """Return what a call's options mean for this model: those and, where they are None, the file's.

        Greedy decoding is temperature 0 in what is returned.
        """
        stated = self.options
        limits = {
            name: getattr(options if _has_limit(options) else stated, name)
            for name in ("max_new_tokens", "max_length")
        }
        penalty = _first(options.repetition_penalty, stated.repetition_penalty)
        is_sampled = options.is_sampling_asked_for or bool(self.do_sample)
        temperature = _first(options.temperature, stated.temperature, 1.0)
        if not is_sampled or temperature == 0:
            sampling: dict[str, Any] = {"temperature": 0.0, "top_k": None, "top_p": None}
        else:
            top_k = _TOP_K_WHEN_SAMPLING if self.do_sample else 0
            sampling = {
                "temperature": temperature,
                "top_k": _first(options.top_k, stated.top_k, top_k),
                "top_p": _first(options.top_p, stated.top_p, 1.0),
            }
        return dataclasses.replace(options, **limits, **sampling, repetition_penalty=penalty)

    def warn_of_ignored(self, place: str) -> None:
        """Name the fields that change text elsewhere and not here, if there are any.

        Args:
            place: What the warning calls the file.
        """
        if self.ignored:
            warn(
                f"{place} has fields that are not implemented here and are ignored: "
                f"{', '.join(self.ignored)}. The text may differ from other programs'"
            )


def changes_text(name: str, value: object) -> bool:
    """Tell whether a field of a `GenerationConfig` asks for something that is not implemented here.

    Unknown ones may: they do, unless their name is private.

    Args:
        name: The field's name.
        value: Its value.
    """
    if value is None or name in HONOURED_FIELDS | FIELDS_WITHOUT_EFFECT or name.startswith("_"):
        return False
    return value not in NEUTRAL_VALUES.get(name, ())


def _is_out_of_range(name: str, value: Any) -> bool:
    """Tell whether a sampling field holds a number that it cannot be."""
    kinds = int if name == "top_k" else int | float
    if name not in _SAMPLING_FIELDS or isinstance(value, bool) or not isinstance(value, kinds):
        return False
    options: dict[str, Any] = {name: value}
    try:
        GenerationOptions(**options)
    except RequestError:
        return True
    return False


def _as_transformers_samples(stated: dict[str, Any]) -> dict[str, Any]:
    """Return options in which what transformers takes as all but greedy is greedy.

    A temperature near 0 leaves the likeliest token alone, and a `top_p` of 0 keeps no other.
    """
    temperature = stated.get("temperature")
    is_cold = isinstance(temperature, float) and 0 < temperature < _COLDEST
    if is_cold or stated.get("top_p") == 0:
        return {k: v for k, v in stated.items() if k != "top_p"} | {"temperature": 0.0}
    return stated


def _has_limit(options: GenerationOptions) -> bool:
    return (options.max_new_tokens, options.max_length) != (None, None)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _number(value: object) -> Any:
    """Return a whole float as an int: JSON of other languages may have 64.0 for 64."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def eos_token_ids(value: object) -> frozenset[int]:
    """Return the ids of a number or a list; negative ones stand for no token.

    Raises:
        RequestError: Anything else.
    """
    if value is None:
        return frozenset()
    ids = [as_int(_number(one)) for one in (value if isinstance(value, list | tuple) else [value])]
    if any(one is None or one > MAX_TOKEN_ID for one in ids):
        raise RequestError(
            f"eos_token_id is {shortened(value)}; expected a token id, a list of token ids, or null"
        )
    return frozenset(one for one in ids if one is not None and one >= 0)

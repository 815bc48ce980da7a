"""What a caller asks of a generation: `GenerationOptions`, validated on construction."""

import dataclasses
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, SupportsIndex, cast

from gemma_deploy.errors import RequestError
from gemma_deploy.quoting import shortened

DEFAULT_MAX_NEW_TOKENS: Final = 256

# Beyond it logits of any size would leave float32's range; no text needs it.
_MAX_FACTOR = 1e4


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to choose tokens and when to stop.

    What is None is as the model's generation_config.json says, else as said below; a given value wins
    over the file's, field by field. If any of `temperature`, `top_k` and `top_p` is given, tokens are
    sampled (greedily at temperature 0), whatever the file's `do_sample` says.

    Attributes:
        max_new_tokens: Most tokens to generate per prompt, at least 1. None without a word in the file
            is 256.
        max_length: Most tokens of prompt and text together; of use only where `max_new_tokens` is None.
        temperature: Logits are divided by it before sampling; 0 is greedy decoding whatever `top_k`
            and `top_p` say. None without a word in the file is 1.
        top_k: Sample among this many likeliest tokens; 0 for all. None without a word in the file is
            50 if its `do_sample` is true, as in transformers, else all.
        top_p: Sample among the fewest likeliest tokens whose probabilities reach this sum, in (0, 1];
            1, and None without a word in the file, for all.
        repetition_penalty: Positive logits of tokens already in the sequence, prompt included, are
            divided by it and negative ones multiplied; 1, and None without a word in the file, for
            none (https://arxiv.org/abs/1909.05858).
        seed: With one, the same prompts give the same text; each row of a call has random numbers
            of its own. None draws a fresh seed.
        stop_token_ids: Tokens that end the text besides the model's own.
        ignore_eos: Whether to go on past the model's own end of text and of turn (for measurements).

    Raises:
        RequestError: On construction, for a value of another type or outside its range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        factor = f"{1 / _MAX_FACTOR:g} to {_MAX_FACTOR:g}"
        checks: dict[str, Callable[[str, object], object]] = {
            "max_new_tokens": partial(whole_number, least=1),
            "max_length": partial(whole_number, least=1),
            "temperature": partial(
                _real,
                is_valid=lambda value: value == 0 or _is_factor(value),
                expected=f"0 (greedy), or {factor}",
            ),
            "top_k": partial(whole_number, least=0),
            "top_p": partial(
                _real, is_valid=lambda value: 0 < value <= 1, expected="above 0 and at most 1"
            ),
            "repetition_penalty": partial(
                _real, is_valid=_is_factor, expected=f"{factor} (1 for none)"
            ),
            "seed": partial(whole_number, least=0),
            "stop_token_ids": _token_ids,
        }
        if not isinstance(self.ignore_eos, bool):
            raise _type_error("ignore_eos", self.ignore_eos, "True or False")
        for name, check in checks.items():
            value = getattr(self, name)
            if value is not None or name == "stop_token_ids":
                # Plain numbers from here on, whatever library the caller's came from.
                object.__setattr__(self, name, check(name, value))

    @property
    def is_sampling_asked_for(self) -> bool:
        """Whether one of the options that only sampling reads is given."""
        return (self.temperature, self.top_k, self.top_p) != (None, None, None)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, as far as these options tell."""
        return self.temperature == 0 or not self.is_sampling_asked_for

    def most_new_tokens(self, prompt_length: int) -> int:
        """Return how many tokens a prompt gets at most; below 1 if `max_length` leaves it no room.

        Args:
            prompt_length: Tokens of the prompt.
        """
        if self.max_new_tokens is None and self.max_length is not None:
            return self.max_length - prompt_length
        return self.max_new_tokens or DEFAULT_MAX_NEW_TOKENS


def with_overrides(
    options: GenerationOptions | None, overrides: Mapping[str, Any]
) -> GenerationOptions:
    """Return options with some of their fields replaced.

    Args:
        options: None for all that are None.
        overrides: Values by the fields' names.

    Raises:
        RequestError: A name that is no field, or a value that cannot be.
    """
    known = {field.name for field in dataclasses.fields(GenerationOptions)}
    if unknown := overrides.keys() - known:
        raise RequestError(
            f"unknown option {', '.join(sorted(unknown))}; expected {', '.join(sorted(known))}"
        )
    if not isinstance(options, GenerationOptions | None):
        raise RequestError(
            f"options is {shortened(options)} ({type(options).__name__}); expected GenerationOptions, or "
            "options by their names"
        )
    return dataclasses.replace(options or GenerationOptions(), **overrides)


def whole_number(name: str, value: object, least: int) -> int:
    """Return a whole number of any library as an int.

    Args:
        name: What an error calls it.
        value: The number.
        least: The smallest that can be, 0 or 1.

    Raises:
        RequestError: It is smaller, or no whole number.
    """
    expected = f"at least {least}" if least else "0 or more"
    number = as_int(value)
    if number is None:
        raise _type_error(name, value, f"a whole number, {expected}")
    if number < least:
        raise RequestError(f"{name} is {number}; it must be {expected}")
    return number


def as_int(value: object) -> int | None:
    """Return a whole number of any library as an int, None for everything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(cast("SupportsIndex", value))
    except TypeError:
        return None


def _is_factor(value: float) -> bool:
    return 1 / _MAX_FACTOR <= value <= _MAX_FACTOR


def _real(name: str, value: object, is_valid: Callable[[float], bool], expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _type_error(name, value, f"a number: {expected}")
    # Compared before it is converted: a huge int has no float.
    if not is_valid(cast("float", value)):
        raise RequestError(f"{name} is {value}; it must be {expected}")
    return float(value)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise _type_error(name, value, "a sequence of token ids, such as (1, 107)")
    given = tuple(value)
    return tuple(whole_number(f"{name}[{index}]", item, 0) for index, item in enumerate(given))


def _type_error(name: str, value: object, expected: str) -> RequestError:
    return RequestError(
        f"{name} is {shortened(value)} ({type(value).__name__}); it must be {expected}"
    )

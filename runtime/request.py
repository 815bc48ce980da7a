"""What a caller asks of a generation: `GenerationOptions`, validated on construction."""

import numbers
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import SupportsIndex, cast

from gemma_deploy.errors import RequestError

# Beyond it logits of any size would leave float32's range; no text needs it.
_MAX_FACTOR = 1e4


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to choose tokens and when to stop; the defaults are greedy decoding.

    Attributes:
        max_new_tokens: Most tokens to generate per prompt, at least 1.
        temperature: Logits are divided by it before sampling; 0 is greedy decoding whatever `top_k`
            and `top_p` say. None is 1 if `top_k` or `top_p` is given, greedy otherwise.
        top_k: Sample among this many likeliest tokens; None for all.
        top_p: Sample among the fewest likeliest tokens whose probabilities reach this sum, in (0, 1];
            None for all.
        repetition_penalty: Positive logits of tokens already in the sequence, prompt included, are
            divided by it and negative ones multiplied; 1 for none (https://arxiv.org/abs/1909.05858).
        seed: With one, the same prompts give the same text; each row of a call has random numbers
            of its own. None draws a fresh seed.
        stop_token_ids: Tokens that end the text besides the model's own.
        ignore_eos: Whether to go on past the model's own end of text (for measurements).

    Raises:
        RequestError: On construction, for a value of another type or outside its range.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        factor = f"{1 / _MAX_FACTOR:g} to {_MAX_FACTOR:g}"
        checked: dict[str, object] = {
            "max_new_tokens": _whole("max_new_tokens", self.max_new_tokens, 1),
            "repetition_penalty": _real(
                "repetition_penalty", self.repetition_penalty, _is_factor, f"{factor} (1 for none)"
            ),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids),
        }
        if self.temperature is not None:
            checked["temperature"] = _real(
                "temperature",
                self.temperature,
                lambda value: value == 0 or _is_factor(value),
                f"0 (greedy), or {factor}",
            )
        if self.top_k is not None:
            checked["top_k"] = _whole("top_k", self.top_k, 1)
        if self.top_p is not None:
            checked["top_p"] = _real(
                "top_p", self.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1"
            )
        if self.seed is not None:
            checked["seed"] = _whole("seed", self.seed, 0)
        if not isinstance(self.ignore_eos, bool):
            raise _type_error("ignore_eos", self.ignore_eos, "True or False")
        for name, value in checked.items():
            # Plain numbers from here on, whatever library the caller's came from.
            object.__setattr__(self, name, value)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        if self.temperature is None:
            return self.top_k is None and self.top_p is None
        return self.temperature == 0


def _is_factor(value: float) -> bool:
    return 1 / _MAX_FACTOR <= value <= _MAX_FACTOR


def _whole(name: str, value: object, least: int) -> int:
    expected = f"at least {least}" if least else "0 or more"
    number = _as_int(value)
    if number is None:
        raise _type_error(name, value, f"a whole number, {expected}")
    if number < least:
        raise RequestError(f"{name} is {number}; it must be {expected}")
    return number


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
    return tuple(_whole(f"{name}[{index}]", item, 0) for index, item in enumerate(given))


def _as_int(value: object) -> int | None:
    """Return a whole number of any library as an int, None for everything else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(cast("SupportsIndex", value))
    except TypeError:
        return None


def _type_error(name: str, value: object, expected: str) -> RequestError:
    return RequestError(f"{name} is {value!r} ({type(value).__name__}); it must be {expected}")

"""What a caller asks of a generation: `GenerationOptions`, validated on construction."""

from dataclasses import dataclass

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
        RequestError: On construction, for a number outside its range.
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
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        temperature = 0.0 if self.temperature is None else self.temperature
        is_valid = temperature == 0 or 1 / _MAX_FACTOR <= temperature <= _MAX_FACTOR
        expected = f"0 (greedy), or {1 / _MAX_FACTOR:g} to {_MAX_FACTOR:g}"
        _require(is_valid, "temperature", temperature, expected)
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        _require(
            self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1"
        )
        penalty = self.repetition_penalty
        is_valid = 1 / _MAX_FACTOR <= penalty <= _MAX_FACTOR
        expected = f"{1 / _MAX_FACTOR:g} to {_MAX_FACTOR:g} (1 for none)"
        _require(is_valid, "repetition_penalty", penalty, expected)
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        if self.temperature is None:
            return self.top_k is None and self.top_p is None
        return self.temperature == 0


def _require(is_valid: bool, name: str, value: object, expected: str) -> None:
    if not is_valid:
        raise RequestError(f"{name} is {value}; it must be {expected}")

"""How long a generation took: `Timings`."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Times of one row. Rows of a batch run at the same time: each row's figures are its own.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated, the one that ended the text included.
        ttft_s: Seconds from the start of the row's batch to its first token; None without a token.
        total_s: Seconds from the start of the row's batch to its last token; without a token, to the
            row's end (0 if it never started).
    """

    prompt_tokens: int
    new_tokens: int
    ttft_s: float | None
    total_s: float

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens per second until the first token; None when there was none."""
        return self.prompt_tokens / self.ttft_s if self.ttft_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first; None when there was no second one."""
        if self.ttft_s is None or self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / (self.total_s - self.ttft_s)

    def to_dict(self) -> dict[str, float | None]:
        """Return every figure under its name, rates included."""
        return {
            **dataclasses.asdict(self),
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }

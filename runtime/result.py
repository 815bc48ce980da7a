"""What a generation gives back: `GenerationResult`."""

from dataclasses import dataclass
from typing import Any, Literal

from gemma_deploy.runtime.metrics import Timings

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """One prompt's text.

    Attributes:
        prompt: The prompt as given; for a chat, the text its messages were turned into.
        text: What was generated, without the token that ended it and without special tokens.
        prompt_token_ids: The prompt's tokens, as the model read them.
        token_ids: Every token generated, the one that ended the text included (as in what
            transformers' `generate` returns).
        finish_reason: `stop` (the model ended the text), `length` (`max_new_tokens` or the KV cache
            is used up) or `cancelled`.
        timings: How long it took.
    """

    prompt: str
    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them, timings with their rates."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "prompt_token_ids": list(self.prompt_token_ids),
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "timings": self.timings.to_dict(),
        }

"""A conversation that always fits the model's context: `Conversation`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from gemma_deploy.errors import GemmaDeployError, PromptTooLongError

Message = dict[str, str]

# Of the context, how much is kept free for an answer when --max-new-tokens asks for more.
_ANSWER_SHARE: Final = 4


@dataclass(kw_only=True)
class Conversation:
    """The messages of a chat, oldest first, and how they are kept short enough.

    Attributes:
        count_tokens: Number of tokens of a list of messages in the model's chat template.
        max_seq_len: Tokens of messages and answer together.
        max_new_tokens: Most tokens of an answer.
        system: System prompt, or None.
        turns: The messages so far, user and assistant in turn; the system prompt is not among
            them.
    """

    count_tokens: Callable[[Sequence[Message]], int]
    max_seq_len: int
    max_new_tokens: int
    system: str | None
    turns: list[Message]

    @property
    def messages(self) -> list[Message]:
        """What the model is given: the system prompt, then the turns."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def ask(self, text: str) -> int:
        """Add a user's message, dropping the oldest exchanges until it fits with an answer.

        Returns:
            Number of exchanges (a message and its answer) that were dropped.

        Raises:
            PromptTooLongError: The message alone is too long; the conversation is as before.
            TokenizerError: The template refuses the message; the conversation is as before.
        """
        before = list(self.turns)
        self.turns.append({"role": "user", "content": text})
        try:
            return self._make_room()
        except GemmaDeployError:
            self.turns[:] = before
            raise

    def take_back(self) -> None:
        """Remove the last message: it got no answer."""
        self.turns.pop()

    def answer(self, text: str) -> None:
        """Add the model's answer to the last message."""
        self.turns.append({"role": "assistant", "content": text})

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.turns.clear()

    def _make_room(self) -> int:
        reserved = min(self.max_new_tokens, self.max_seq_len // _ANSWER_SHARE)
        dropped = 0
        while (needed := self.count_tokens(self.messages)) > self.max_seq_len - reserved:
            if len(self.turns) == 1:
                raise PromptTooLongError(
                    f"the message has {needed} tokens, and an answer is left room of {reserved}; "
                    f"the context holds {self.max_seq_len}: shorten it"
                )
            del self.turns[:2]
            dropped += 1
        return dropped

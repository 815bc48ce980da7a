"""What the user says, as the tokens the model reads: `Prompt`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.tokenizer import GemmaTokenizer

END_OF_TURN = "<end_of_turn>"
_ASSISTANT_ROLES = frozenset({"assistant", "model"})

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text or a chat.

    Attributes:
        text: The text as given; for a chat, the text its messages were turned into.
        token_ids: What the model reads.
    """

    text: str
    token_ids: list[int]


def text_prompt(tokenizer: GemmaTokenizer, text: str, number: int = 0) -> Prompt:
    """Encode a text.

    Args:
        tokenizer: The model's.
        text: Anything but nothing.
        number: What an error calls the prompt.

    Raises:
        RequestError: The text is empty.
    """
    if not text:
        raise RequestError(f"prompt {number} is empty: give at least one character")
    return Prompt(text, tokenizer.encode(text))


def chat_prompt(tokenizer: GemmaTokenizer, messages: Sequence[Message]) -> Prompt:
    """Encode a conversation up to where the answer begins.

    Args:
        tokenizer: The model's.
        messages: Each with `role` and `content`, the user's last.

    Raises:
        RequestError: There are no messages, or the last is the assistant's.
        TokenizerError: The chat template refuses the messages.
    """
    if not messages:
        raise RequestError("the chat has no messages: give at least the user's first")
    if messages[-1].get("role") in _ASSISTANT_ROLES:
        raise RequestError(
            "the chat ends with the assistant's message, which leaves nothing to answer; expected "
            "the user's last: add one, or drop the answer to have another one"
        )
    return Prompt(tokenizer.apply_chat_template(messages), tokenizer.encode_chat(messages))


def ending_with_the_turn(
    options: GenerationOptions, tokenizer: GemmaTokenizer
) -> GenerationOptions:
    """Return the options of an answer in a chat: `<end_of_turn>` also ends it."""
    end_of_turn = tokenizer.token_to_id(END_OF_TURN)
    if end_of_turn is None:
        return options
    stops = (*options.stop_token_ids, end_of_turn)
    return dataclasses.replace(options, stop_token_ids=stops)

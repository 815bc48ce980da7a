"""What the user says, as the tokens the model reads: `Prompt`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_deploy.errors import RequestError
from gemma_deploy.quoting import shortened
from gemma_deploy.tokenizer import GemmaTokenizer

_ASSISTANT_ROLES = frozenset({"assistant", "model"})

Message = Mapping[str, Any]
"""`role`, `content` (a text, a list of parts, or None) and what else a chat template reads."""

Tools = Sequence[Mapping[str, Any]]
"""JSON schemas of functions, for chat templates that know tools."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text or a chat.

    Attributes:
        text: The text as given; for a chat, the text its messages were turned into.
        token_ids: What the model reads.
        is_chat: Whether the end of the template's turn ends what the model says.
    """

    text: str
    token_ids: list[int]
    is_chat: bool = False


def text_prompts(
    tokenizer: GemmaTokenizer, texts: object, *, allow_special: bool = True
) -> list[Prompt]:
    """Encode a text, or several.

    Args:
        tokenizer: The model's.
        texts: A string or an iterable of strings; an empty one is `<bos>` alone.
        allow_special: Whether control tokens that a text spells become these tokens.

    Raises:
        RequestError: It is neither, or a text is empty and the tokenizer has no `<bos>`.
        TokenizerError: A text is not valid Unicode.
    """
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, bytes | bytearray | Mapping) or not isinstance(texts, Iterable):
        raise RequestError(
            f"the prompts are {_described(texts)}; expected a string or a list of strings"
        )
    return [
        _text_prompt(tokenizer, text, number, allow_special=allow_special)
        for number, text in enumerate(texts, 1)
    ]


def _text_prompt(
    tokenizer: GemmaTokenizer, text: object, number: int, *, allow_special: bool
) -> Prompt:
    if not isinstance(text, str):
        raise RequestError(f"prompt {number} is {_described(text)}; expected a string")
    token_ids = tokenizer.encode(text, allow_special=allow_special)
    if not token_ids:
        if tokenizer.bos_token_id is None:
            raise RequestError(
                f"prompt {number} is empty, and the tokenizer has no <bos> to start from: give at "
                "least one character"
            )
        token_ids = [tokenizer.bos_token_id]
    return Prompt(text, token_ids)


def chat_prompt(
    tokenizer: GemmaTokenizer,
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    continue_final_message: bool = False,
) -> Prompt:
    """Encode a conversation up to where the answer begins, or goes on.

    Args:
        tokenizer: The model's.
        messages: Each with `role` and `content`.
        tools: For the chat template.
        continue_final_message: Whether the last message is the beginning of the answer.

    Raises:
        RequestError: There are no messages.
        TokenizerError: The chat template refuses the messages.
    """
    if not messages:
        raise RequestError("the chat has no messages: give at least the user's first")
    arguments: dict[str, Any] = {
        "tools": tools,
        "add_generation_prompt": not continue_final_message,
        "continue_final_message": continue_final_message,
    }
    return Prompt(
        tokenizer.apply_chat_template(messages, **arguments),
        tokenizer.encode_chat(messages, **arguments),
        is_chat=True,
    )


def check_answerable(messages: Sequence[Message]) -> None:
    """Refuse a conversation that ends with the assistant's message.

    Raises:
        RequestError: It does.
    """
    if ends_with_the_assistant(messages):
        raise RequestError(
            "the chat ends with the assistant's message, which leaves nothing to answer; expected "
            "the user's last: add one, drop the answer to have another one, or have it continued "
            "with continue_final_message=True"
        )


def ends_with_the_assistant(messages: object) -> bool:
    """Tell whether the last of some messages is the assistant's; False for what is no messages."""
    if not isinstance(messages, Sequence) or not messages:
        return False
    last = messages[-1]
    role = last.get("role") if isinstance(last, Mapping) else None
    return isinstance(role, str) and role in _ASSISTANT_ROLES


def _described(value: object) -> str:
    return f"{shortened(value)} ({type(value).__name__})"

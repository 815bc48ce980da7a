"""What the pipeline is called with, told apart: `read_inputs`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_deploy.errors import RequestError
from gemma_deploy.quoting import shortened
from gemma_deploy.runtime.prompts import Message

TextInputs = str | Iterable[str] | Iterable[Message] | Iterable[Iterable[Message]]


@dataclass(frozen=True, slots=True)
class PipelineInputs:
    """Texts or chats.

    Attributes:
        items: Strings, or lists of messages.
        is_batch: Whether a list of them was given, and not one.
        are_chats: Whether they are chats.
    """

    items: list[Any]
    is_batch: bool
    are_chats: bool


def read_inputs(given: object) -> PipelineInputs:
    """Tell texts from chats and one from many.

    Args:
        given: A text, a chat (messages with `role` and `content`), or any number of either; any
            iterable is as good as a list.

    Raises:
        RequestError: Anything else, naming what was found.
    """
    if isinstance(given, str):
        return PipelineInputs([given], is_batch=False, are_chats=False)
    items = _listed(given, "text_inputs")
    if items and all(_is_message(one) for one in items):
        return PipelineInputs([items], is_batch=False, are_chats=True)
    if all(isinstance(one, str) for one in items):
        return PipelineInputs(items, is_batch=True, are_chats=False)
    chats = [_chat(one, f"text_inputs[{index}]") for index, one in enumerate(items)]
    return PipelineInputs(chats, is_batch=True, are_chats=True)


def _chat(given: object, place: str) -> list[Any]:
    if isinstance(given, str):
        raise RequestError(
            f"text_inputs mixes texts and chats: {place} is {shortened(given)}; {_EXPECTED}"
        )
    messages = _listed(given, place)
    for index, message in enumerate(messages):
        if not _is_message(message):
            raise _error(message, f"{place}[{index}]")
    if not messages:
        raise _error(messages, place)
    return messages


def _listed(given: object, place: str) -> list[Any]:
    if isinstance(given, bytes | bytearray | Mapping) or not isinstance(given, Iterable):
        raise _error(given, place)
    return list(given)


def _is_message(one: object) -> bool:
    # An answer that only calls tools may have no content.
    return isinstance(one, Mapping) and "role" in one and ("content" in one or "tool_calls" in one)


def _error(found: object, place: str) -> RequestError:
    return RequestError(f"{place} is {shortened(found)} ({type(found).__name__}); {_EXPECTED}")


_EXPECTED = (
    "expected a text, a list of texts, a chat (a list of messages with role and content), or a list "
    "of chats"
)

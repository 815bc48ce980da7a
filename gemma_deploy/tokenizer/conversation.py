"""What a chat template is given: a conversation, checked and copied as plain JSON values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from gemma_deploy.errors import TokenizerError
from gemma_deploy.quoting import shortened

_ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")
_MOST_LEVELS: Final = 100
_TOOL_ROLES: Final = frozenset({"tool", "function"})
# Names under which a message's reasoning is given; transformers copies it to the first two.
_REASONING_KEYS: Final = ("reasoning_content", "thinking", "reasoning")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages and tools, as plain JSON values, with how the text made of them ends.

    Attributes:
        messages: Each with a "role". A "content" is a string or text parts (a tool's may also be an
            object, or a list of objects); it is left out where it was null.
        tools: JSON schemas; None for no tools.
        add_generation_prompt: Whether the text ends with the opening of the model's turn.
        continue_final_message: Whether it ends with the last message, left open.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @classmethod
    def of(
        cls,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> "Conversation":
        """Check what a caller gave.

        Nothing but plain values reaches a template: methods of richer objects would be callable
        from its sandbox. The role "model", as Gemma calls it, becomes "assistant"; keys whose value
        is null are left out, as in transformers.

        Raises:
            TokenizerError: There are no messages, one is malformed, has an unknown role or holds
                something else than text; a tool is no JSON schema; or the message to continue is
                not the assistant's, or has no content.
        """
        _check_is_list(messages, "messages", '{"role": ..., "content": ...}')
        if not messages:
            raise TokenizerError("There are no messages; expected at least one from the user.")
        plain = [_plain_message(message, number) for number, message in enumerate(messages, 1)]
        if continue_final_message:
            _check_can_be_continued(plain[-1])
        return cls(
            messages=plain,
            tools=None if tools is None else _plain_tools(tools),
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
        )

    def with_answers(self, change: Callable[[str], str]) -> "Conversation":
        """Return a copy in which `change` was applied to each text of the assistant's contents."""
        return dataclasses.replace(
            self,
            messages=[
                {**message, "content": _changed_content(message["content"], change)}
                if message["role"] == "assistant" and "content" in message
                else message
                for message in self.messages
            ],
        )

    def characters(self) -> set[str]:
        """Return every character of every string, keys included."""
        found: set[str] = set()
        pending: list[Any] = [self.messages, self.tools]
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                found |= set(value)
            elif isinstance(value, list):
                pending += value
            elif isinstance(value, dict):
                pending += [*value, *value.values()]
        return found


def joined_parts(content: list[dict[str, Any]]) -> str:
    """Return text parts as one text, with nothing between them, as Gemma 3's template has it."""
    return "".join(part["text"] for part in content)


def is_parts(content: object) -> bool:
    """Whether a checked content is text parts, rather than a string or what a tool returned."""
    return isinstance(content, list) and all("type" in part for part in content)


def _changed_content(content: Any, change: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return change(content)
    return [{**part, "text": change(part["text"])} for part in content]


def _check_is_list(value: object, name: str, item: str) -> None:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise TokenizerError(f"{name} is a {type(value).__name__}; expected a list of {item}.")


def _plain_message(message: object, number: int) -> dict[str, Any]:
    name = f"Message {number}"
    plain = _plain(message, name)
    # An answer that only calls tools may have no content.
    needed = (
        {"role"} if isinstance(plain, dict) and plain.get("tool_calls") else {"role", "content"}
    )
    if not isinstance(plain, dict) or not needed <= plain.keys():
        raise TokenizerError(
            f'{name} is {shortened(message)}; expected an object with "role" and "content".'
        )
    if plain["role"] == "model":
        plain["role"] = "assistant"
    if plain["role"] not in _ROLES:
        raise TokenizerError(
            f"{name} has the role {shortened(plain['role'])}; expected one of {', '.join(_ROLES)}."
        )
    plain = {key: value for key, value in plain.items() if value is not None}
    if "content" in plain:
        plain["content"] = _checked_content(plain["content"], plain["role"], name)
    reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
    if reasoning is not None:
        return {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _checked_content(content: Any, role: str, name: str) -> Any:
    if isinstance(content, str):
        return content
    objects = content if isinstance(content, list) else [content]
    if all(isinstance(item, dict) for item in objects):
        is_result = role in _TOOL_ROLES and not any("type" in item for item in objects)
        if is_result or (role in _TOOL_ROLES and isinstance(content, dict)):
            return content
        if isinstance(content, list):
            for part in content:
                _check_part(part, name)
            # No parts and no text are the same; only a string is never printed as a list.
            return content or ""
    raise TokenizerError(
        f"{name} has a content of type {type(content).__name__}; expected a string, or a list of "
        '{"type": "text", "text": ...}.'
    )


def _check_part(part: dict[str, Any], name: str) -> None:
    kind = part.get("type")
    if kind != "text":
        raise TokenizerError(
            f"{name} has a content part of type {shortened(kind)}; expected only "
            '{"type": "text", "text": ...}, as the model reads nothing but text. Leave the part out.'
        )
    if not isinstance(part.get("text"), str):
        raise TokenizerError(
            f"{name} has a text part whose text is {shortened(part.get('text'))}; expected a string."
        )


def _plain_tools(tools: Sequence[object]) -> list[dict[str, Any]]:
    schema = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
    _check_is_list(tools, "tools", schema)
    for number, tool in enumerate(tools, 1):
        if not isinstance(tool, Mapping):
            found = f"function {tool.__name__!r}" if hasattr(tool, "__name__") else shortened(tool)
            raise TokenizerError(
                f"Tool {number} is {found}; expected its JSON schema, {schema}. Write one (for a "
                "Python function, transformers.utils.get_json_schema does)."
            )
    return [_plain(tool, f"Tool {number}") for number, tool in enumerate(tools, 1)]


def _check_can_be_continued(message: Mapping[str, Any]) -> None:
    if message["role"] != "assistant":
        raise TokenizerError(
            f'The message to continue is from "{message["role"]}"; expected the assistant\'s. End '
            "the messages with the beginning of an answer, or set continue_final_message=False."
        )
    if "content" not in message:
        raise TokenizerError(
            "The message to continue has no content; expected the beginning of an answer. Set "
            "add_generation_prompt=True instead of continue_final_message=True."
        )


def _plain(value: object, name: str, levels: int = _MOST_LEVELS) -> Any:
    # Exact types: a subclass of str could bring methods of its own.
    if value is None or type(value) in {str, bool, int, float}:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if levels == 0:
        raise TokenizerError(
            f"{name} is nested too deeply; expected at most {_MOST_LEVELS} lists and objects within "
            "each other."
        )
    if isinstance(value, Mapping):
        return {
            _checked_key(key, name): _plain(item, name, levels - 1) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, name, levels - 1) for item in value]
    raise TokenizerError(
        f"{name} holds a {type(value).__name__}; expected only what JSON has: strings, numbers, "
        "booleans, null, lists and objects."
    )


def _checked_key(key: object, name: str) -> str:
    if not isinstance(key, str):
        raise TokenizerError(
            f"{name} has the key {shortened(key)} of type {type(key).__name__}; expected a string."
        )
    return str.__str__(key)

"""Finding the form of contents that a chat template reads: parts, or one text."""

import dataclasses
from collections.abc import Callable
from typing import Any

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer.conversation import Conversation, is_parts, joined_parts


def contents_as_read(
    conversation: Conversation, render: Callable[[Conversation], str]
) -> Conversation:
    """Return a conversation whose contents have the form that the template reads.

    Some templates loop over text parts, others expect strings, and some do the one for one role
    and the other for another. Given a list, those that expect strings would print it as Python
    does, skip it, or fail. So the template is watched: parts stay where it looks into them, and
    become one text where it does not.

    Args:
        conversation: As its callers gave it.
        render: The template.

    Raises:
        TokenizerError: The template fails with either form; or it prints what a tool returned as
            Python would.
    """
    while True:
        messages = conversation.messages
        watches = {
            index: _Watch(message["content"])
            for index, message in enumerate(messages)
            if isinstance(message.get("content"), list | dict)
        }
        if not watches:
            return conversation
        failure = _failure(render, conversation, watches)
        unread = []
        for index, watch in watches.items():
            if is_parts(messages[index]["content"]):
                if watch.is_printed or not watch.is_read:
                    unread.append(index)
            elif watch.is_printed:
                raise TokenizerError(
                    f"Message {index + 1} has an object as content, which the chat template prints "
                    "as Python would; expected a string. Give it as JSON text."
                )
        if failure is not None:
            if not unread:
                raise failure
            # The template did not come to what is behind the message that it failed at; how it
            # reads messages of other roles is not known yet.
            role = messages[unread[0]]["role"]
            unread = [index for index in unread if messages[index]["role"] == role]
        if not unread:
            return conversation
        conversation = _with_contents(
            conversation, {index: joined_parts(messages[index]["content"]) for index in unread}
        )


def _failure(
    render: Callable[[Conversation], str], conversation: Conversation, watches: dict[int, "_Watch"]
) -> TokenizerError | None:
    """Render watched contents, and return how that fails."""
    contents = {index: watch.content for index, watch in watches.items()}
    # A message left open would be copied, and its copy not watched.
    closed = dataclasses.replace(conversation, continue_final_message=False)
    try:
        render(_with_contents(closed, contents))
    except TokenizerError as err:
        return err
    return None


def _with_contents(conversation: Conversation, contents: dict[int, Any]) -> Conversation:
    messages = [
        {**message, "content": contents[index]} if index in contents else message
        for index, message in enumerate(conversation.messages)
    ]
    return dataclasses.replace(conversation, messages=messages)


class _Watch:
    """A copy of a content that notes what a template does with it.

    Attributes:
        content: The copy.
        is_read: Whether the text of a part in it was looked at.
        is_printed: Whether it, or something in it, was turned into a string as Python does it.
    """

    def __init__(self, content: Any) -> None:
        self.is_read = False
        self.is_printed = False
        self.content = self._copied(content)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, list):
            return _WatchedList(self, map(self._copied, value))
        if isinstance(value, dict):
            return _WatchedDict(self, {key: self._copied(item) for key, item in value.items()})
        return value


# The names below begin with an underscore: templates cannot reach them from their sandbox.


class _WatchedList(list[Any]):
    def __init__(self, watch: _Watch, items: Any) -> None:
        super().__init__(items)
        self._watch = watch

    def __repr__(self) -> str:
        self._watch.is_printed = True
        return super().__repr__()

    __str__ = __repr__


class _WatchedDict(dict[str, Any]):
    def __init__(self, watch: _Watch, items: dict[str, Any]) -> None:
        super().__init__(items)
        self._watch = watch

    def __repr__(self) -> str:
        self._watch.is_printed = True
        return super().__repr__()

    __str__ = __repr__

    def __getitem__(self, key: str) -> Any:
        self._watch.is_read |= key == "text"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._watch.is_read |= key == "text"
        return super().get(key, default)

    def items(self) -> Any:
        self._watch.is_read = True
        return super().items()

    def values(self) -> Any:
        self._watch.is_read = True
        return super().values()

from collections import UserDict
from enum import StrEnum
from typing import Any

import pytest

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer.conversation import Conversation

USER: dict[str, Any] = {"role": "user", "content": "Hi"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "Ho"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}
SCHEMA = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def weather(place: str) -> str:
    return place


def nested() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "There are no messages; expected at least one"),
        ("hi", "messages is a str; expected a list"),
        (USER, "messages is a dict; expected a list"),
        (["hi"], "Message 1 is 'hi'; expected an object"),
        ([USER, {"role": "user"}], 'Message 2 is .*; expected an object with "role" and "content"'),
        ([{"role": "assistant", "tool_calls": []}], "Message 1 is .* expected an object"),
        ([{"role": "robot", "content": ""}], "Message 1 has the role 'robot'; expected one of"),
        ([{"role": ["user"], "content": ""}], r"Message 1 has the role \['user'\]"),
        ([{"role": None, "content": ""}], "Message 1 has the role None"),
        (
            [{"role": "user", "content": 5}],
            "Message 1 has a content of type int; expected a string",
        ),
        ([{"role": "user", "content": ["hi"]}], "Message 1 has a content of type list"),
        ([{"role": "user", "content": {"a": 1}}], "Message 1 has a content of type dict"),
        ([{"role": "tool", "content": 5}], "Message 1 has a content of type int"),
        ([{"role": "user", "content": [{"text": "a"}]}], "a content part of type None"),
        ([{"role": "user", "content": [{"type": "text"}]}], "a text part whose text is None"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "whose text is 5"),
        ([{**USER, "image": object()}], "Message 1 holds a object; expected only what JSON has"),
        (
            [{"role": "user", "content": "", 5: "a"}],
            "Message 1 has the key 5 of type int; expected a string",
        ),
        (
            [USER, {**USER, "name": nested()}],
            "Message 2 is nested too deeply; expected at most 100",
        ),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Conversation.of(messages)


@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
@pytest.mark.parametrize(
    "kind", ["image", "image_url", "input_image", "audio", "input_audio", "video", "file"]
)
def test_what_is_not_text_is_refused_by_its_type(role: str, kind: str) -> None:
    content = [{"type": "text", "text": "what is this?"}, {"type": kind, kind: "cat.png"}]
    with pytest.raises(
        TokenizerError, match=f"Message 2 has a content part of type '{kind}'; expected only"
    ):
        Conversation.of([USER, {"role": role, "content": content}])


def test_errors_do_not_quote_a_megabyte() -> None:
    for message in ("x" * 10**6, {"role": "x" * 10**6, "content": ""}, {"text": "x" * 10**6}):
        messages: list[Any] = [message]
        with pytest.raises(TokenizerError) as caught:
            Conversation.of(messages)
        assert len(str(caught.value)) < 400


def test_null_is_left_out_and_content_may_be_missing_beside_calls() -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}
    expected = {"role": "assistant", "tool_calls": [CALL]}
    assert Conversation.of([USER, calling]).messages[1] == expected
    assert Conversation.of([USER, expected]).messages[1] == expected
    assert Conversation.of([{"role": "user", "content": None}]).messages == [{"role": "user"}]


def test_what_a_tool_returns_may_be_an_object() -> None:
    for content in ({"type": "rain", "mm": 3}, [{"name": "weather", "response": {"mm": 3}}]):
        message: dict[str, Any] = {"role": "tool", "content": content}
        assert Conversation.of([USER, message]).messages[1] == message


def test_richer_types_become_plain() -> None:
    class Role(StrEnum):
        USER = "user"

    (message,) = Conversation.of((UserDict({"role": Role.USER, "content": ""}),)).messages
    assert message == {"role": "user", "content": ""}
    assert type(message["role"]) is str


def test_role_model_is_assistant() -> None:
    assert Conversation.of([{**ANSWER, "role": "model"}]).messages == [ANSWER]


def test_the_callers_messages_are_not_changed() -> None:
    messages = [USER, {"role": "model", "content": parts("a"), "name": None, "thinking": "b"}]
    before = repr(messages)
    Conversation.of(messages, continue_final_message=True).with_answers(str.upper)
    assert repr(messages) == before


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([weather], "Tool 1 is function 'weather'; expected its JSON schema"),
        ([SCHEMA, "weather"], "Tool 2 is 'weather'; expected its JSON schema"),
        (SCHEMA, "tools is a dict; expected a list"),
        ([{**SCHEMA, "call": weather}], "Tool 1 holds a function; expected only what JSON has"),
    ],
)
def test_malformed_tools(tools: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Conversation.of([USER], tools=tools)


def test_continuing_wins_over_the_generation_prompt() -> None:
    conversation = Conversation.of([USER, ANSWER], continue_final_message=True)
    assert not conversation.add_generation_prompt


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (USER, 'The message to continue is from "user"; expected the assistant\'s'),
        ({"role": "assistant", "tool_calls": [CALL]}, "The message to continue has no content"),
    ],
)
def test_what_cannot_be_continued(last: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Conversation.of([USER, last], continue_final_message=True)


def test_characters_are_those_of_all_strings() -> None:
    message = {**USER, "a": [{"b": "c"}], "n": 5}
    tool: dict[str, Any] = {"d": {"e": "f"}}
    found = Conversation.of([message], tools=[tool]).characters()
    assert found == set("roleusercontentHia") | set("bcn") | set("def")


def test_only_the_assistants_contents_are_answers() -> None:
    messages = [USER, {**ANSWER, "name": "n"}, {"role": "assistant", "content": parts("a", "b")}]
    changed = Conversation.of(messages).with_answers(lambda text: text + "!").messages
    assert changed == [
        USER,
        {"role": "assistant", "content": "Ho!", "name": "n"},
        {"role": "assistant", "content": parts("a!", "b!")},
    ]

import json
from pathlib import Path

import pytest

from gemma_deploy.cli.chat_commands import ChatState, obey
from gemma_deploy.cli.conversation import Conversation
from gemma_deploy.runtime.request import GenerationOptions


@pytest.fixture
def state() -> ChatState:
    """A chat in which a question was answered."""
    conversation = Conversation(
        count_tokens=len, max_seq_len=100, max_new_tokens=256, system=None, turns=[]
    )
    conversation.ask("Hello?")
    conversation.answer("Hello.")
    return ChatState(
        conversation=conversation,
        options=GenerationOptions(),
        resolved=lambda options: options,
        context_tokens=100,
    )


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["/exit", "/quit", "/bye"])
def test_leaving(state: ChatState, name: str) -> None:
    assert not obey(state, name)


@pytest.mark.parametrize("name", ["/reset", "/clear"])
def test_starting_anew(state: ChatState, name: str) -> None:
    assert obey(state, name)
    assert state.conversation.turns == []


def test_a_system_prompt_starts_anew(state: ChatState, capsys: pytest.CaptureFixture[str]) -> None:
    assert obey(state, "/system Answer in one word.")
    assert state.conversation.messages == [{"role": "system", "content": "Answer in one word."}]
    said(capsys)
    assert obey(state, "/system")
    assert said(capsys) == "Answer in one word.\n"


def test_options_are_set_shown_and_left_to_the_model(
    state: ChatState, capsys: pytest.CaptureFixture[str]
) -> None:
    assert obey(state, "/set temperature 0.7")
    assert obey(state, "/set max-new-tokens 12")
    assert state.options == GenerationOptions(temperature=0.7, max_new_tokens=12)
    assert state.conversation.max_new_tokens == 12
    said(capsys)
    assert obey(state, "/set")
    assert said(capsys) == "max-new-tokens 12, temperature 0.7\n"
    assert obey(state, "/set temperature default")
    assert obey(state, "/set max-new-tokens default")
    assert state.options == GenerationOptions()
    assert state.conversation.max_new_tokens == 256


def test_a_length_of_all_bounds_the_conversation(state: ChatState) -> None:
    state.options = GenerationOptions(max_length=60)
    state.fit()
    assert state.conversation.max_seq_len == 60
    obey(state, "/set max-new-tokens 5")
    assert (state.conversation.max_seq_len, state.conversation.max_new_tokens) == (100, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/set warmth 1", "warmth cannot be set; expected max-new-tokens, temperature"),
        ("/set top-k many", "Error: top-k is 'many'; expected a whole number"),
        ("/set top-p many", "Error: top-p is 'many'; expected a number"),
        ("/set temp", "Give a number: /set temperature VALUE"),
        ("/set top-p 3", "Error: top_p is 3"),
        ("/save", "Give a file"),
        ("/nonsense", "/nonsense is no command; /help lists them."),
    ],
)
def test_what_cannot_be_is_said(
    state: ChatState, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert obey(state, text)
    assert message in said(capsys)
    assert state.options == GenerationOptions()


def test_a_conversation_is_saved_never_over_a_file(
    state: ChatState, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chat.json"
    assert obey(state, f"/save {path}")
    assert json.loads(path.read_text()) == state.conversation.messages
    said(capsys)
    obey(state, "/reset")
    assert obey(state, f"/save {path}")
    assert "is there already" in said(capsys)
    assert len(json.loads(path.read_text())) == 2

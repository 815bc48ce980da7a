from collections.abc import Sequence

import pytest

from gemma_deploy.cli.conversation import Conversation, Message
from gemma_deploy.errors import PromptTooLongError, TokenizerError


class TestConversation:
    def test_grows_by_message_and_answer(self) -> None:
        chat = conversation(system="Be brief.")
        chat.ask("one")
        chat.answer("two")
        chat.ask("three")

        assert [(m["role"], m["content"]) for m in chat.messages] == [
            ("system", "Be brief."),
            ("user", "one"),
            ("assistant", "two"),
            ("user", "three"),
        ]

    def test_drops_the_oldest_exchanges_and_never_the_system_prompt(self) -> None:
        # 15 words fit beside an answer of 5.
        chat = conversation(system="s s", max_seq_len=20, max_new_tokens=5)
        assert exchange(chat, "a a a", "b b b") == 0
        assert exchange(chat, "c c c", "d d d") == 0

        assert chat.ask("e e e e") == 1

        assert [m["content"] for m in chat.messages] == ["s s", "c c c", "d d d", "e e e e"]

    def test_drops_as_many_as_needed(self) -> None:
        chat = conversation(max_seq_len=20, max_new_tokens=5)
        exchange(chat, "a a a", "b b b")
        exchange(chat, "c c c", "d d d")

        assert chat.ask("e " * 15) == 2

    def test_keeps_at_most_a_quarter_free(self) -> None:
        chat = conversation(max_seq_len=20, max_new_tokens=1000)

        assert chat.ask("a " * 15) == 0

    def test_a_message_too_long_by_itself(self) -> None:
        chat = conversation(max_seq_len=20, max_new_tokens=5)
        exchange(chat, "a", "b")

        with pytest.raises(PromptTooLongError, match=r"has 16 tokens, .* room of 5; .* holds 20"):
            chat.ask("c " * 16)

        assert [m["content"] for m in chat.messages] == ["a", "b"]

    def test_a_message_that_the_template_refuses(self) -> None:
        def refuse(_messages: Sequence[Message]) -> int:
            raise TokenizerError("no template")

        chat = conversation()
        chat.count_tokens = refuse

        with pytest.raises(TokenizerError, match="no template"):
            chat.ask("one")

        assert chat.messages == []

    def test_take_back_and_reset(self) -> None:
        chat = conversation(system="s")
        exchange(chat, "a", "b")
        chat.ask("c")
        chat.take_back()
        assert [m["content"] for m in chat.messages] == ["s", "a", "b"]

        chat.reset()

        assert [m["content"] for m in chat.messages] == ["s"]


def conversation(
    *, system: str | None = None, max_seq_len: int = 100, max_new_tokens: int = 5
) -> Conversation:
    """Return a conversation whose tokens are words."""
    return Conversation(
        count_tokens=lambda messages: sum(len(m["content"].split()) for m in messages),
        max_seq_len=max_seq_len,
        max_new_tokens=max_new_tokens,
        system=system,
        turns=[],
    )


def exchange(chat: Conversation, message: str, answer: str) -> int:
    dropped = chat.ask(message)
    chat.answer(answer)
    return dropped

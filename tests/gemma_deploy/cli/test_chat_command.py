import fcntl
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from gemma_deploy.runtime.streaming import TextStream
from gemma_deploy.runtime.text_generator import TextGenerator

# Takes over the pseudo-terminal as its own, so that Ctrl-C reaches it as a signal.
WITH_TERMINAL = (
    "import fcntl, runpy, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "sys.argv = ['gemma-deploy', *sys.argv[1:]]\n"
    "runpy.run_module('gemma_deploy', run_name='__main__')\n"
)
DEADLINE_S = 60


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITH_TERMINAL, "chat", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "NO_COLOR": "1"},
        )
        self.settings = termios.tcgetattr(slave)
        self._slave = slave
        self._shown = ""
        fcntl.fcntl(self._master, fcntl.F_SETFL, os.O_NONBLOCK)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, pattern: str) -> str:
        """Return what is shown up to the end of the pattern's next match."""
        deadline = time.monotonic() + DEADLINE_S
        while (match := re.search(pattern, self._shown)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} never came, only {self._shown!r}"
            try:
                self._shown += os.read(self._master, 65536).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.01)
        shown, self._shown = self._shown[: match.end()], self._shown[match.end() :]
        return shown

    def are_settings_restored(self) -> bool:
        return termios.tcgetattr(self._slave) == self.settings

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def terminal(bundle: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*options: str) -> Terminal:
        opened.append(Terminal(str(bundle), *options))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


class TestTerminal:
    def test_answers_obeys_and_leaves(self, terminal: Callable[..., Terminal]) -> None:
        chat = terminal("--max-new-tokens", "8")
        chat.until("/help lists the commands")
        chat.until("> ")

        chat.type("/stats\n")
        chat.until(r"is shown\.\r\n> ")
        chat.type("Hello\n")
        chat.until(r"Hello\r\n(?s:.*)\(.* \d tokens in .*\)\r\n> ")
        chat.type("/help\n")
        chat.until(r"/reset  (?s:.*)Ctrl-C stops an answer\.\r\n> ")
        chat.type("/reset\n")
        chat.until(r"starts anew\.\r\n> ")
        chat.type("/nonsense\n")
        chat.until(r"/nonsense is no command; /help lists them\.\r\n> ")
        chat.type("/exit\n")

        assert chat.process.wait(DEADLINE_S) == 0

    def test_ctrl_c_stops_the_answer_and_not_the_chat(
        self, terminal: Callable[..., Terminal]
    ) -> None:
        chat = terminal("--max-new-tokens", "8000")
        chat.until("> ")
        chat.type("Tell me everything\n")
        chat.until(r"everything\r\n.{20}")

        chat.type("\x03")

        chat.until(r"Interrupted after \d+ tokens\.\)\r\n> ")
        chat.type("/exit\n")
        assert chat.process.wait(DEADLINE_S) == 0

    def test_ctrl_c_at_the_prompt_discards_the_line(
        self, terminal: Callable[..., Terminal]
    ) -> None:
        chat = terminal()
        chat.until("> ")

        chat.type("half a thought\x03")

        chat.until("Ctrl-D or /exit leaves")
        chat.until("> ")
        chat.type("/exit\n")
        assert chat.process.wait(DEADLINE_S) == 0

    def test_ctrl_d_leaves_a_usable_terminal(self, terminal: Callable[..., Terminal]) -> None:
        chat = terminal()
        chat.until("> ")

        chat.type("\x04")

        assert chat.process.wait(DEADLINE_S) == 0
        assert chat.are_settings_restored()

    def test_lines_can_be_edited(self, terminal: Callable[..., Terminal]) -> None:
        chat = terminal()
        chat.until("> ")

        chat.type("/exix\x7ft\n")

        assert chat.process.wait(DEADLINE_S) == 0


class TestPiped:
    def test_answers_go_to_stdout_and_nothing_else_does(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        result = invoke("chat", bundle, "--max-new-tokens", 4, input="Hello\n")

        alone = invoke("generate", bundle, "--chat", "Hello", "--max-new-tokens", 4)
        assert result.exit_code == 0
        assert result.stdout == alone.stdout

    def test_the_model_is_given_the_history(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        def answers(text: str) -> list[str]:
            return invoke("chat", bundle, "--max-new-tokens", 8, input=text).stdout.splitlines()

        with_history = answers("First\nSecond\n")[-1]
        without = answers("First\n/reset\nSecond\n")[-1]

        assert without == answers("Second\n")[-1]
        assert with_history != without

    def test_long_conversations_lose_their_beginning(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        text = "one word after the other\n" * 4

        result = invoke("chat", bundle, "--max-new-tokens", 8, "--max-seq-len", 80, input=text)

        assert result.exit_code == 0
        assert "(The oldest exchange was dropped: the context holds 80 tokens.)" in result.stderr

    def test_a_message_too_long_leaves_the_chat_alive(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        options = ("--max-new-tokens", 4, "--max-seq-len", 64)

        result = invoke("chat", bundle, *options, input="word " * 200 + "\nHello there\n")

        assert result.exit_code == 0
        assert "Error: the message has" in result.stderr
        assert result.stdout == invoke("chat", bundle, *options, input="Hello there\n").stdout
        assert result.stdout.strip()

    def test_an_empty_answer_is_said_and_forgotten(
        self, invoke: Callable[..., Result], bundle: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone = invoke("chat", bundle, "--max-new-tokens", 8, input="Second\n").stdout
        chat = TextGenerator.chat
        asked: list[int] = []

        def silent_at_first(self: TextGenerator, *args: Any, **kwargs: Any) -> TextStream:
            asked.append(len(args[0]))
            if len(asked) == 1:
                kwargs["is_cancelled"] = lambda: True
            return chat(self, *args, **kwargs)

        monkeypatch.setattr(TextGenerator, "chat", silent_at_first)

        result = invoke("chat", bundle, "--max-new-tokens", 8, input="First\nSecond\n")

        assert "(The answer is empty; the message is forgotten.)" in result.stderr
        assert asked == [1, 1]
        assert result.stdout == "\n" + alone

    def test_lines_that_go_on(self, invoke: Callable[..., Result], bundle: Path) -> None:
        joined = invoke("chat", bundle, "--max-new-tokens", 8, input="one\\\ntwo\n")
        expected = invoke("generate", bundle, "--chat", "one\ntwo", "--max-new-tokens", 8)

        assert joined.stdout == expected.stdout

    def test_lines_of_windows(self, invoke: Callable[..., Result], bundle: Path) -> None:
        options = ("--max-new-tokens", 8)
        plain = invoke("chat", bundle, *options, input=b"one\\\ntwo\nthree\n")
        windows = invoke("chat", bundle, *options, input=b"\xef\xbb\xbfone\\\r\ntwo\r\nthree\r\n")

        assert windows.stdout == plain.stdout
        assert len(plain.stdout.splitlines()) >= 2

    def test_a_line_in_another_encoding_leaves_the_chat_alive(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        result = invoke("chat", bundle, "-n", 8, input="café\n".encode("latin-1") + b"Hello\n")

        assert "Error: the message is not UTF-8 text: byte 3 is 0xe9" in result.stderr
        assert result.stdout == invoke("chat", bundle, "-n", 8, input="Hello\n").stdout

    def test_how_an_answer_ended_is_said_once(
        self, invoke: Callable[..., Result], bundle: Path
    ) -> None:
        result = invoke("chat", bundle, "-n", 4, input="Hi\n/stats\nHi\n")

        assert result.stderr.count("(Stopped at the limit after 4 tokens.)") == 1
        assert result.stderr.count("(stopped at the limit: 4 tokens in ") == 1

    def test_stats(self, invoke: Callable[..., Result], bundle: Path) -> None:
        result = invoke("chat", bundle, "--max-new-tokens", 4, input="/stats\nHi\n/stats\nHi\n")

        assert "The speed of answers is shown." in result.stderr
        assert "The speed of answers is hidden." in result.stderr
        assert result.stderr.count("tokens/s)") == 1

"""`gemma-deploy chat`: a conversation in the terminal."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.cli.chat_commands import ChatState, obey
from gemma_deploy.cli.console import notice, say, speak
from gemma_deploy.cli.conversation import Conversation
from gemma_deploy.cli.generate_command import summary
from gemma_deploy.cli.interrupt import cancel_on_interrupt
from gemma_deploy.cli.loading import load_model, tell_sampling
from gemma_deploy.cli.options import generation_options, runtime_options, sampling_options
from gemma_deploy.cli.prepacked_option import prepacked_cache_option
from gemma_deploy.cli.prompts import argument_text
from gemma_deploy.cli.reading import reading_progress
from gemma_deploy.errors import RequestError, TokenizerError
from gemma_deploy.text_files import decode_text

if TYPE_CHECKING:
    from gemma_deploy.runtime.request import GenerationOptions
    from gemma_deploy.runtime.text_generator import TextGenerator


@click.command(
    "chat",
    short_help="Talk to a model in the terminal.",
    epilog="""\b
Examples:
  gemma-deploy chat gemma-2b-it
  gemma-deploy chat gemma-2b-it --system "Answer in one sentence." --temperature 0.7

The model should be an instruction-tuned one (its name ends in -it). How tokens are chosen is what the
options say, else what the model's generation_config.json says, else greedy. In the chat, /help lists the
commands; Ctrl-C stops an answer, which stays in the conversation as far as it came.
""",
)
@click.argument("bundle", type=click.Path())
@click.option("--system", metavar="TEXT", help="System prompt: what the model is told beforehand.")
@sampling_options
@runtime_options
@prepacked_cache_option
def command(
    *,
    bundle: str,
    system: str | None,
    device: str,
    threads: int | None,
    max_seq_len: int | None,
    backend: str,
    prepacked_cache: Path | None,
    **sampling: Any,
) -> None:
    """Talk to the model in the folder BUNDLE.

    The whole conversation is given to the model with each message. When it no longer fits the
    context, the oldest exchanges are dropped, with a notice.
    """
    options = generation_options(**sampling)
    if system is not None:
        system = argument_text(system, "--system")
    generator = load_model(
        bundle,
        backend=backend,
        device=device,
        max_seq_len=max_seq_len,
        threads=threads,
        prepacked_cache=prepacked_cache,
    )
    from gemma_deploy.runtime.request import DEFAULT_MAX_NEW_TOKENS

    tell_sampling(generator, options)
    with generator:
        conversation = Conversation(
            count_tokens=lambda messages: len(generator.tokenizer.encode_chat(messages)),
            max_seq_len=generator.max_seq_len,
            max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
            system=system,
            turns=[],
        )
        Chat(generator, conversation, options).run()


class Chat:
    """Reads messages and commands until the user leaves.

    Args:
        generator: The model.
        conversation: What was said so far.
        options: How answers are generated.
    """

    def __init__(
        self,
        generator: "TextGenerator",
        conversation: Conversation,
        options: "GenerationOptions",
    ) -> None:
        self._generator = generator
        self._state = ChatState(
            conversation=conversation,
            options=options,
            resolved=generator.resolved_options,
            context_tokens=generator.max_seq_len,
        )
        self._state.fit()

    def run(self) -> None:
        """Serve messages until /exit or the end of input."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - importing it gives input() line editing and history
            notice("Type a message; /help lists the commands.")
        while (text := _read_message()) is not None:
            if text.startswith("/"):
                if not obey(self._state, text):
                    return
            elif text:
                self._reply(text)

    def _reply(self, text: str) -> None:
        """Answer a message; a message that cannot be answered leaves the conversation as it was."""
        conversation = self._state.conversation
        try:
            dropped = conversation.ask(text)
        except (RequestError, TokenizerError) as err:
            notice(f"Error: {err}")
            return
        if dropped:
            exchanges = "exchange was" if dropped == 1 else f"{dropped} exchanges were"
            notice(
                f"(The oldest {exchanges} dropped: the context holds {conversation.max_seq_len} tokens.)"
            )
        with cancel_on_interrupt() as is_cancelled, reading_progress() as on_progress:
            try:
                stream = self._generator.chat(
                    conversation.messages,
                    self._state.options,
                    is_cancelled=is_cancelled,
                    on_progress=on_progress,
                )
            except RequestError as err:
                conversation.take_back()
                notice(f"Error: {err}")
                return
            with stream:
                for piece in stream:
                    speak(piece)
        say()
        result = stream.result
        if result.text:
            conversation.answer(result.text)
        else:
            conversation.take_back()
            notice("(The answer is empty; the message is forgotten.)")
        if self._state.shows_stats:  # how it ended is among them
            notice(f"({summary(result)})")
        elif result.finish_reason == "cancelled":
            count = len(result.token_ids)
            notice(
                f"(Interrupted {f'after {count} tokens' if count else 'before the first token'}.)"
            )
        elif result.finish_reason == "length":
            notice(f"(Stopped at the limit after {len(result.token_ids)} tokens.)")


def _read_message() -> str | None:
    """Return the next message, or None when there is no more input.

    Ctrl-C while typing discards the message.
    """
    prompt = "> " if sys.stdin.isatty() else ""
    lines: list[str] = []
    while True:
        try:
            line = input(". " if lines else prompt) if prompt else _piped_line()
        except EOFError:
            if prompt:
                say()
            return "\n".join(lines).strip() or None
        except KeyboardInterrupt:
            lines.clear()
            notice("\n(Ctrl-D or /exit leaves.)")
            continue
        except (RequestError, UnicodeDecodeError) as err:
            notice(f"Error: {err}")
            continue
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines).strip()


def _piped_line() -> str:
    """Return the next line of stdin, in UTF-8 whatever the locale's encoding.

    Raises:
        EOFError: There is none.
        RequestError: It is not UTF-8.
    """
    raw = sys.stdin.buffer.readline()
    if not raw:
        raise EOFError
    return decode_text(raw, "the message").removesuffix("\n")

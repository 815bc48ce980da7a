"""The commands of `gemma-deploy chat`, which begin with a slash: `obey`."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gemma_deploy.cli.console import notice
from gemma_deploy.cli.conversation import Conversation
from gemma_deploy.errors import RequestError
from gemma_deploy.user_paths import user_path

if TYPE_CHECKING:
    from gemma_deploy.runtime.request import GenerationOptions

_HELP: Final = """\
/reset              forget the conversation, keep the system prompt (also /clear)
/system TEXT        tell the model TEXT beforehand, and start anew; without TEXT, show what it
                    is told
/set NAME VALUE     change how answers are generated; the VALUE default leaves it to the model
                    again; without NAME, show what was set. NAME is one of
                    {names}
/save FILE          write the conversation to FILE, as JSON
/stats              show or hide the speed of each answer
/help               show this
/exit               leave (also /quit and /bye; Ctrl-D does too)
A line that ends in \\ goes on in the next one. Ctrl-C stops an answer."""

_ALIASES: Final[Mapping[str, str]] = {"/clear": "/reset", "/quit": "/exit", "/bye": "/exit"}
_SETTABLE: Final[Mapping[str, type[int] | type[float]]] = {
    "max-new-tokens": int,
    "temperature": float,
    "top-k": int,
    "top-p": float,
    "repetition-penalty": float,
    "seed": int,
}
_SHORT_NAMES: Final[Mapping[str, str]] = {"temp": "temperature"}  # as the option's is --temp


@dataclass(slots=True, kw_only=True)
class ChatState:
    """What commands look at and change.

    Attributes:
        conversation: What was said so far.
        options: How answers are generated.
        resolved: Returns what options mean for the model.
        context_tokens: Most tokens that the model holds.
        shows_stats: Whether the speed of each answer is shown.
    """

    conversation: Conversation
    options: "GenerationOptions"
    resolved: "Callable[[GenerationOptions], GenerationOptions]"
    context_tokens: int
    shows_stats: bool = False

    def fit(self) -> None:
        """Let the conversation be as long, and its answers, as the options say."""
        options = self.resolved(self.options)
        is_total = options.max_new_tokens is None and options.max_length is not None
        most = (
            min(self.context_tokens, options.max_length or 0) if is_total else self.context_tokens
        )
        self.conversation.max_seq_len = most
        self.conversation.max_new_tokens = options.most_new_tokens(0)


def obey(state: ChatState, text: str) -> bool:
    """Carry out a command, and say what was done; return whether the chat goes on."""
    name, _, argument = text.partition(" ")
    name, argument = _ALIASES.get(name, name), argument.strip()
    if name == "/exit":
        return False
    if name == "/reset":
        state.conversation.reset()
        notice("The conversation starts anew.")
    elif name == "/system":
        _system(state, argument)
    elif name == "/set":
        _set(state, argument)
    elif name == "/save":
        _save(state, argument)
    elif name == "/stats":
        state.shows_stats = not state.shows_stats
        notice(f"The speed of answers is {'shown' if state.shows_stats else 'hidden'}.")
    elif name == "/help":
        notice(_HELP.format(names=", ".join(_SETTABLE)))
    else:
        notice(f"{name} is no command; /help lists them.")
    return True


def _system(state: ChatState, text: str) -> None:
    if text:
        state.conversation.system = text
        state.conversation.reset()
        notice("The conversation starts anew.")
    else:
        notice(state.conversation.system or "(The model is told nothing beforehand.)")


def _set(state: ChatState, argument: str) -> None:
    from gemma_deploy.runtime.request import with_overrides

    if not argument:
        given = {name: getattr(state.options, _field(name)) for name in _SETTABLE}
        said = [f"{name} {value}" for name, value in given.items() if value is not None]
        notice(", ".join(said) or "(Nothing is set: answers are generated as the model says.)")
        return
    name, _, value = argument.partition(" ")
    name = _SHORT_NAMES.get(name, name)
    if name not in _SETTABLE:
        notice(f"{name} cannot be set; expected {', '.join(_SETTABLE)}.")
        return
    if not value:
        notice(f"Give a number: /set {name} VALUE, or /set {name} default")
        return
    kind = _SETTABLE[name]
    try:
        number = None if value == "default" else kind(value)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        notice(f"Error: {name} is {value!r}; expected {expected}")
        return
    try:
        state.options = with_overrides(state.options, {_field(name): number})
    except RequestError as err:
        notice(f"Error: {err}")
        return
    state.fit()
    notice(f"{name} is {'left to the model' if number is None else number}.")


def _save(state: ChatState, name: str) -> None:
    if not name:
        notice("Give a file: /save FILE")
        return
    text = json.dumps(state.conversation.messages, ensure_ascii=False, indent=1)
    try:
        with user_path(name).open("x", encoding="utf-8") as file:  # never over another file
            file.write(text + "\n")
    except RequestError as err:
        notice(f"Error: {err}")
    except FileExistsError:
        notice(f"Error: {name} is there already, and is not written over: give another name")
    except OSError as err:
        notice(f"Error: {name} cannot be written: {err.strerror}")
    else:
        notice(f"wrote {name}")


def _field(name: str) -> str:
    return name.replace("-", "_")

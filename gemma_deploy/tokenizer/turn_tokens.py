"""Finding the control tokens that a chat template writes around messages."""

import itertools
import re
from typing import NamedTuple

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer.chat_template import ChatTemplate
from gemma_deploy.tokenizer.control_tokens import ControlTokens, normalized
from gemma_deploy.tokenizer.conversation import Conversation

# Texts that no template compares or changes.
_QUESTION, _ANSWER, _NEXT_QUESTION, _NEXT_ANSWER = "\ue000", "\ue001", "\ue002", "\ue003"


class TurnTokens(NamedTuple):
    """Control tokens of a chat template, spaces as U+2581.

    Attributes:
        ending: Those that it writes right behind an answer (or behind whitespace there).
        framing: All that it writes in a conversation in which the model only talks.
    """

    ending: frozenset[str]
    framing: frozenset[str]


def find_turn_tokens(template: ChatTemplate, control_tokens: ControlTokens) -> TurnTokens:
    """Render short conversations, and look at what stands around their messages.

    They are tried with and without a system message, and with texts and parts as contents; those
    that the template refuses say nothing.
    """
    ending: set[str] = set()
    framing: set[str] = set()
    for with_system, as_parts in itertools.product((False, True), repeat=2):
        try:
            text = template.render(_short_conversation(with_system, as_parts))
        except TokenizerError:
            continue
        framing.update(control_tokens.found(text[: text.rfind(_NEXT_QUESTION) + 1]))
        found = dict(control_tokens.matches(text))
        for answer in re.finditer(rf"[{_ANSWER}{_NEXT_ANSWER}]\s*", text):
            if (end := found.get(answer.end())) is not None:
                ending.add(normalized(text[answer.end() : end]))
    return TurnTokens(frozenset(ending), frozenset(framing))


def _short_conversation(with_system: bool, as_parts: bool) -> Conversation:
    texts = (_QUESTION, _ANSWER, _NEXT_QUESTION, _NEXT_ANSWER)
    messages = [
        ("system", _QUESTION),
        *zip(("user", "assistant", "user", "assistant"), texts, strict=True),
    ]
    return Conversation(
        messages=[
            {"role": role, "content": [{"type": "text", "text": text}] if as_parts else text}
            for role, text in messages[not with_system :]
        ],
        add_generation_prompt=False,
    )

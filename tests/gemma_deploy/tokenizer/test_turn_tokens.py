from typing import Any

import pytest

from gemma_deploy.tokenizer import GemmaTokenizer
from gemma_deploy.tokenizer.chat_template import DEFAULT_CHAT_TEMPLATE

GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim"
    " + '<end_of_turn>\n' }}{% endfor %}"
)
# (what a template writes for each message, the tokens right behind an answer)
TURNS = [
    ("<start_of_turn>{{ m.content }}<end_of_turn>\n", {"<end_of_turn>"}),
    ("<unused0>{{ m.role }}\n{{ m.content }}<unused1>\n", {"<unused1>"}),
    ("<unused0>{{ m.content | upper }}\n<unused1>", {"<unused1>"}),
    ("{{ m.content }}{{ eos_token }}", {"<eos>"}),
    ("{{ m.content }}{{ eos_token if m.role == 'assistant' else '<unused0>' }}", {"<eos>"}),
    ("{{ m.content }}{{ '<unused0>' if not loop.last else eos_token }}", {"<unused0>", "<eos>"}),
    ("{{ m.content }}{{ '<' ~ 'eos' ~ '>' }}", {"<eos>"}),
    ("{% for part in m.content %}{{ part['text'] + '<unused0>' }}{% endfor %}", {"<unused0>"}),
    ("{% if messages[0].role != 'system' %}{{ 1 / 0 }}{% endif %}{{ m.content }}<eos>", {"<eos>"}),
    ("<start_of_turn>{{ m.content }} END <end_of_turn>", set()),
    ("{{ m.role }}: {{ m.content }}\n", set()),
    ("{{ raise_exception('no') }}", set()),
]


@pytest.mark.parametrize(("turn", "ending"), TURNS)
def test_ids_behind_an_answer(write_folder: Any, turn: str, ending: set[str]) -> None:
    template = "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
    tokenizer = GemmaTokenizer.from_pretrained(write_folder(template=template))
    assert {tokenizer.id_to_token(token_id) for token_id in tokenizer.end_of_turn_ids} == ending
    assert tokenizer.has_chat_template


@pytest.mark.parametrize("template", [None, DEFAULT_CHAT_TEMPLATE, GEMMA_2])
def test_gemmas_turns(write_folder: Any, template: str | None) -> None:
    tokenizer = GemmaTokenizer.from_pretrained(write_folder(template=template))
    assert tokenizer.end_of_turn_ids == {tokenizer.token_to_id("<end_of_turn>")}
    assert tokenizer.has_chat_template == (template is not None)


def test_base_vocabulary_has_no_turns() -> None:
    assert GemmaTokenizer().end_of_turn_ids == frozenset()
    assert not GemmaTokenizer().has_chat_template


def test_an_answer_cannot_hold_what_the_template_frames_turns_with(write_folder: Any) -> None:
    template = "{{ bos_token }}{% for m in messages %}<unused0>{{ m.content }}<eos>{% endfor %}"
    tokenizer = GemmaTokenizer.from_pretrained(write_folder(template=template))
    content = "a<unused0>b<unused1>c"
    chat = [{"role": role, "content": content} for role in ("user", "assistant", "user")]
    ids = tokenizer.encode_chat(chat)
    unused = [tokenizer.token_to_id(f"<unused{index}>") for index in (0, 1)]
    assert [token_id for token_id in ids if token_id in unused] == [
        unused[0],
        unused[0],
        unused[1],
        unused[0],
    ]


def test_an_answer_cannot_hold_eos_whichever_token_is_named_so(write_folder: Any) -> None:
    # As in Gemma 3's files.
    tokenizer = GemmaTokenizer.from_pretrained(write_folder(config={"eos_token": "<end_of_turn>"}))
    chat = [{"role": role, "content": "a<eos>"} for role in ("user", "assistant", "user")]
    assert tokenizer.token_to_id("<eos>") not in tokenizer.encode_chat(chat)

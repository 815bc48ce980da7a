"""Chats: what the model is given, and what ends an answer."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.text_generator import TextGenerator
from gemma_deploy.tokenizer import GemmaTokenizer
from gemma_deploy.tokenizer.settings import TokenizerSettings

USER = {"role": "user", "content": "Names"}


@pytest.fixture(scope="module")
def generator(text_bundle: Any) -> Iterator[TextGenerator]:
    with TextGenerator.open(ModelSource.open(text_bundle("gemma1")), threads=1) as generator:
        yield generator


def closed(stream: Any) -> Any:
    stream.close()
    return stream.result


def test_a_chat_stops_at_the_end_of_the_turn(
    scripted_generator: Any, scripted_session: Any
) -> None:
    generator = scripted_generator()
    end_of_turn = generator.tokenizer.token_to_id("<end_of_turn>")
    assert end_of_turn not in generator.eos_token_ids
    messages = [{"role": "user", "content": "Names"}]
    free = generator.chat(messages, max_new_tokens=6)
    list(free)
    assert list(free.result.prompt_token_ids) == generator.tokenizer.encode_chat(messages)
    assert free.result.prompt == generator.tokenizer.apply_chat_template(messages)
    said = np.zeros(512, np.float32)
    said[end_of_turn] = 1
    scripted_session.steps.clear()
    scripted_session.logits_at_step = {3: said}
    stream = generator.chat(messages, max_new_tokens=6)
    assert "".join(stream) == stream.result.text
    assert stream.result.finish_reason == "stop"
    assert stream.result.token_ids == (*free.result.token_ids[:3], end_of_turn)
    assert "<end_of_turn>" not in stream.result.text


class Spoken:
    """A tokenizer as another checkpoint has it: its own ends of text, with or without a template."""

    def __init__(self, tokenizer: GemmaTokenizer, *, eos: int | None, has_template: bool) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = eos
        self.has_chat_template = has_template
        self.end_of_turn_ids = frozenset({300})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize(
    ("eos", "has_template", "plain", "chat"),
    [
        (None, False, {1, 7}, {1, 7, 300}),
        (200, False, {1, 7, 200}, {1, 7, 200, 300}),
        (200, True, {1, 7, 200, 300}, {1, 7, 200, 300}),
    ],
)
def test_a_text_ends_by_what_any_of_the_files_says(
    text_checkpoint: Any, scripted_session: Any, eos: Any, has_template: bool, plain: Any, chat: Any
) -> None:
    folder = text_checkpoint("gemma1")
    scripted_session.vocab_size = 512
    tokenizer: Any = Spoken(
        GemmaTokenizer.from_pretrained(folder), eos=eos, has_template=has_template
    )
    generator = TextGenerator(scripted_session, tokenizer, ModelSource.open(folder))
    assert generator.eos_token_ids == plain

    def ends(token_id: int, call: Any, **options: Any) -> bool:
        said = np.zeros(512, np.float32)
        said[token_id] = 9
        scripted_session.steps.clear()
        scripted_session.logits_at_step = {1: said}
        result = call(max_new_tokens=4, **options)
        return bool(result.finish_reason == "stop")

    def stream_of(made: Any) -> Any:
        list(made)
        return made.result

    for token_id in (1, 7, 200, 300, 301):
        for call, expected in (
            (lambda **o: generator.generate("Names", **o)[0], plain),
            (lambda **o: stream_of(generator.stream("Names", **o)), plain),
            (lambda **o: stream_of(generator.chat([USER], **o)), chat),
            (lambda **o: generator.answer([[USER]], **o)[0], chat),
        ):
            assert ends(token_id, call) is (token_id in expected)
            assert not ends(token_id, call, ignore_eos=True)
            assert ends(token_id, call, ignore_eos=True, stop_token_ids=(token_id,))


def test_a_begun_answer_is_gone_on_with(generator: TextGenerator) -> None:
    begun = [USER, {"role": "assistant", "content": "refer"}]
    with generator.chat(begun, continue_final_message=True, max_new_tokens=6) as stream:
        list(stream)
    expected = generator.tokenizer.encode_chat(
        begun, add_generation_prompt=False, continue_final_message=True
    )
    assert list(stream.result.prompt_token_ids) == expected
    assert stream.result.prompt.endswith("model\nrefer")
    (answer,) = generator.answer([begun], continue_final_message=True, max_new_tokens=6)
    assert answer.token_ids == stream.result.token_ids


def test_tools_reach_the_template(scripted_generator: Any, text_checkpoint: Any) -> None:
    folder = text_checkpoint("gemma1")
    template = "{{ bos_token }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}Names"
    tokenizer = GemmaTokenizer(
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        TokenizerSettings(chat_template=template),
    )
    generator = scripted_generator().with_tokenizer(tokenizer)
    tools = [{"type": "function", "function": {"name": "sequence"}}]
    for given, text in ((tools, "<bos>[sequence]Names"), (None, "<bos>Names")):
        assert closed(generator.chat([USER], tools=given)).prompt == text
        assert generator.answer([[USER]], tools=given, max_new_tokens=1)[0].prompt == text


def test_answers_are_those_of_chat(generator: TextGenerator) -> None:
    chats = [[USER], [{"role": "user", "content": "The for statement"}]]
    expected = []
    for chat in chats:
        with generator.chat(chat, max_new_tokens=12) as stream:
            list(stream)
        expected.append(stream.result)
    for batch_size in (1, 2):
        answers = generator.answer(chats, max_new_tokens=12, batch_size=batch_size)
        for answer, result in zip(answers, expected, strict=True):
            assert dataclasses.replace(answer, timings=result.timings) == result


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_each_answer_has_random_numbers_of_its_own(
    generator: TextGenerator, batch_size: int
) -> None:
    options = GenerationOptions(max_new_tokens=12, temperature=2.0, seed=1)
    answers = generator.answer([[USER]] * 3, options, batch_size=batch_size)
    assert len({answer.token_ids for answer in answers}) == 3
    with generator.chat([USER], options) as stream:
        list(stream)
    assert answers[0].token_ids == stream.result.token_ids


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the chat has no messages"),
        ([USER, {"role": "assistant", "content": "refer"}], "ends with the assistant's message"),
        ([USER, {"role": "model", "content": "refer"}], "ends with the assistant's message"),
    ],
)
def test_a_chat_with_nothing_to_answer_is_refused(
    generator: TextGenerator, messages: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        generator.chat(messages)
    with pytest.raises(RequestError, match=message):
        generator.answer([[USER], messages])

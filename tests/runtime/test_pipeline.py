from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from gemma_deploy.errors import RequestError, TokenizerError
from gemma_deploy.runtime.generation_config import GenerationDefaults
from gemma_deploy.runtime.pipeline import TextGenerationPipeline
from gemma_deploy.runtime.pipeline_settings import PipelineSettings, without_nones
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.text_generator import TextGenerator
from gemma_deploy.tokenizer.chat_template import DEFAULT_CHAT_TEMPLATE

TEXTS = ["The for statement", "Names refer to"]
CHAT = [{"role": "user", "content": "a tuple or a list"}]


@pytest.fixture(scope="module")
def pipeline(text_bundle: Any) -> Iterator[TextGenerationPipeline]:
    generator = TextGenerator.open(ModelSource.open(text_bundle("gemma1")), threads=1)
    with TextGenerationPipeline(generator) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def expected(text_checkpoint: Any) -> Any:
    folder = text_checkpoint("gemma1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)


OPTIONS = {"max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("extra", [{}, {"return_full_text": False}, {"repetition_penalty": 1.3}])
def test_texts_are_transformers(pipeline: Any, expected: Any, extra: Any) -> None:
    one = pipeline(TEXTS[0], **OPTIONS, **extra)
    assert one == expected(TEXTS[0], **OPTIONS, **extra)
    several = pipeline(TEXTS, **OPTIONS, **extra)
    assert several == expected(TEXTS, **OPTIONS, **extra)
    assert several[0] == one


def test_a_chat_gets_an_answer(pipeline: Any) -> None:
    (answer,) = pipeline(CHAT, **OPTIONS)
    messages = answer["generated_text"]
    assert messages[:-1] == CHAT
    assert messages[-1]["role"] == "assistant"
    with pipeline.generator.chat(CHAT, max_new_tokens=12) as stream:
        assert messages[-1]["content"] == "".join(stream)
    (short,) = pipeline(CHAT, return_full_text=False, **OPTIONS)
    assert short == {"generated_text": messages[-1]["content"]}
    assert pipeline([CHAT, CHAT], **OPTIONS) == [[answer], [answer]]


def test_several_sequences_of_one_text(pipeline: Any) -> None:
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 1, "temperature": 2.0}
    sequences = pipeline(TEXTS[0], num_return_sequences=3, **options)
    assert len({sequence["generated_text"] for sequence in sequences}) == 3
    assert pipeline(TEXTS, num_return_sequences=3, **options)[0] == sequences


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_several_answers_to_one_chat(pipeline: Any, batch_size: int) -> None:
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 1, "temperature": 2.0}
    answers = pipeline(CHAT, num_return_sequences=3, batch_size=batch_size, **options)
    assert len({answer["generated_text"][-1]["content"] for answer in answers}) == 3
    first, second = pipeline([CHAT, CHAT], batch_size=batch_size, **options)
    assert [first, second] == [answers[:1], answers[1:2]]


def test_chats_run_in_batches(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    step = pipeline.generator.session.step

    def counted(input_ids: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(input_ids))
        return step(input_ids, *arguments, **options)

    monkeypatch.setattr(pipeline.generator.session, "step", counted)
    pipeline([CHAT] * 3, max_new_tokens=2, do_sample=False, batch_size=2)
    assert sizes == [2, 2, 1, 1]


def with_template(tokenizer: Any) -> Any:
    """transformers has no template where a checkpoint has none; ours is Gemma's then."""
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


BEGUN = [*CHAT, {"role": "assistant", "content": "Names refer"}]


@pytest.mark.parametrize("chat", [CHAT, BEGUN])
@pytest.mark.parametrize("extra", [{}, {"return_full_text": False}])
def test_chats_are_transformers(pipeline: Any, expected: Any, chat: Any, extra: Any) -> None:
    with_template(expected.tokenizer)
    assert pipeline(chat, **OPTIONS, **extra) == expected(chat, **OPTIONS, **extra)
    batch = [chat, CHAT, BEGUN]
    assert pipeline(batch, **OPTIONS, **extra) == expected(batch, **OPTIONS, **extra)


@pytest.mark.parametrize(("chat", "is_continued"), [(CHAT, False), (BEGUN, True), (BEGUN, False)])
def test_continue_final_message_is_transformers(
    pipeline: Any, expected: Any, chat: Any, is_continued: bool
) -> None:
    with_template(expected.tokenizer)
    settings = {**OPTIONS, "continue_final_message": is_continued}
    assert pipeline(chat, **settings) == expected(chat, **settings)


def test_an_empty_text_starts_from_bos(pipeline: Any, expected: Any) -> None:
    for texts in ("", ["", *TEXTS]):
        assert pipeline(texts, **OPTIONS) == expected(texts, **OPTIONS)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 20, "do_sample": False},
        {"max_new_tokens": 5, "max_length": 6, "truncation": True, "do_sample": False},
        {**OPTIONS, "return_tensors": True},
        {**OPTIONS, "return_text": True},
        {**OPTIONS, "skip_special_tokens": False},
        {**OPTIONS, "num_beams": 1, "use_cache": True, "min_p": None},
    ],
)
def test_other_keywords_are_transformers(pipeline: Any, expected: Any, settings: Any) -> None:
    for text in TEXTS:
        assert pipeline(text, **settings) == expected(text, **settings)


def test_a_token_said_to_end_texts_is_shown_as_in_transformers(
    pipeline: Any, expected: Any
) -> None:
    (ids,) = pipeline(TEXTS[0], return_tensors=True, **OPTIONS)
    settings = {**OPTIONS, "eos_token_id": ids["generated_token_ids"][-4]}
    for skips in (True, False):
        given = {**settings, "skip_special_tokens": skips}
        assert pipeline(TEXTS[0], **given) == expected(TEXTS[0], **given)
    assert len(pipeline(TEXTS[0], **settings)[0]["generated_text"]) < len(
        pipeline(TEXTS[0], **OPTIONS)[0]["generated_text"]
    )


def test_an_answer_of_no_parts_is_continued(pipeline: Any) -> None:
    contents: list[Any] = ["", []]
    answers = [
        pipeline([*CHAT, {"role": "assistant", "content": content}], **OPTIONS)
        for content in contents
    ]
    assert answers[0] == answers[1]
    assert answers[0][0]["generated_text"][-1]["content"]


def test_parts_of_a_message_are_continued(pipeline: Any) -> None:
    parts = [{"type": "text", "text": "Names refer"}]
    chat = [*CHAT, {"role": "assistant", "content": parts}]
    (answer,) = pipeline(chat, **OPTIONS)
    (text,) = pipeline(chat, return_full_text=False, **OPTIONS)
    whole = [{"type": "text", "text": "Names refer" + text["generated_text"]}]
    assert answer["generated_text"][-1] == {"role": "assistant", "content": whole}
    assert parts == [{"type": "text", "text": "Names refer"}]


def test_an_answer_that_only_calls_tools_has_no_content(pipeline: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "user", "content": "Well?"},
    ]
    # It reaches Gemma's own template, which has no place for it.
    with pytest.raises(TokenizerError, match="it has no place for tools"):
        pipeline(chat)


def test_what_a_pipeline_is_made_of(pipeline: Any) -> None:
    assert pipeline.model is pipeline.generator
    assert pipeline.tokenizer is pipeline.generator.tokenizer
    assert str(pipeline.device) == "cpu"


def test_a_call_replaces_what_the_pipeline_returns(pipeline: Any) -> None:
    short = TextGenerationPipeline(pipeline.generator, return_full_text=False, **OPTIONS)
    (ids,) = short(TEXTS[0], return_tensors=True)
    assert set(ids) == {"generated_token_ids"}


def test_an_iterator_is_as_good_as_a_list(pipeline: Any) -> None:
    assert pipeline(iter(TEXTS), **OPTIONS) == pipeline(TEXTS, **OPTIONS)
    assert pipeline(iter(CHAT), **OPTIONS) == pipeline(CHAT, **OPTIONS)
    assert pipeline((iter(CHAT) for _ in range(2)), **OPTIONS) == pipeline([CHAT] * 2, **OPTIONS)


def options_of(pipeline: TextGenerationPipeline, **settings: Any) -> Any:
    defaults = pipeline.generator.generation_defaults
    return PipelineSettings.read(without_nones(settings), defaults).options


def test_defaults_are_transformers_pipelines(pipeline: Any) -> None:
    options = options_of(pipeline)
    assert options.most_new_tokens(9) == 256
    assert (options.temperature, options.top_k, options.top_p) == (0.7, 50, 1.0)


def test_generation_config_stands_in_for_what_is_not_given(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Gemma 3's.
    stated = {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"}
    defaults = GenerationDefaults.parse(stated, "generation_config.json")
    monkeypatch.setattr(pipeline.generator, "generation_defaults", defaults)
    options = options_of(pipeline, top_k=5)
    assert (options.top_k, options.top_p, options.temperature) == (5, 0.95, 0.7)
    greedy = options_of(pipeline, do_sample=False)
    assert greedy.is_greedy


def test_sampling_is_switched_off_as_in_transformers(pipeline: Any) -> None:
    assert options_of(pipeline, top_k=0).top_k == 0
    nones = dict.fromkeys(("temperature", "top_k", "top_p", "repetition_penalty"))
    options = options_of(pipeline, **nones)
    assert not options.is_greedy
    assert (options.temperature, options.top_k, options.top_p) == (1.0, 0, 1.0)
    assert options.repetition_penalty == 1.0


def test_none_is_not_given(pipeline: Any) -> None:
    names = ("max_new_tokens", "return_full_text", "num_return_sequences", "batch_size", "seed")
    given = {**dict.fromkeys(names), "eos_token_id": None, "do_sample": False}
    assert options_of(pipeline, **given) == options_of(pipeline, do_sample=False)
    short = TextGenerationPipeline(pipeline.generator, max_new_tokens=3, do_sample=False)
    assert short(TEXTS[0], **dict.fromkeys(names)) == short(TEXTS[0])


def test_padding_is_no_matter(pipeline: Any, expected: Any) -> None:
    given = {**OPTIONS, "pad_token_id": 3}
    assert pipeline(TEXTS, **given) == expected(TEXTS, **given)


def test_eos_token_id_replaces_the_models(pipeline: Any) -> None:
    assert not options_of(pipeline).ignore_eos
    for given, expected_ids in ((9, (9,)), ([9, 10], (9, 10))):
        options = options_of(pipeline, eos_token_id=given)
        assert options.ignore_eos
        assert set(options.stop_token_ids) == set(expected_ids)


def test_keywords_of_the_pipeline_are_defaults_of_its_calls(pipeline: Any) -> None:
    short = TextGenerationPipeline(pipeline.generator, **OPTIONS, return_full_text=False)
    (given,) = short(TEXTS[0])
    assert given == pipeline(TEXTS[0], return_full_text=False, **OPTIONS)[0]
    (longer,) = short(TEXTS[0], max_new_tokens=13)
    assert longer["generated_text"].startswith(given["generated_text"])
    assert longer != given


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        ("x", {"beams": 4}, "unknown keyword argument beams; the pipeline knows batch_size"),
        ("x", {"num_beams": 4}, "num_beams is 4, which is not implemented"),
        ("x", {"stop_strings": ["."]}, "stop_strings is .*, which is not implemented"),
        ("x", {"clean_up_tokenization_spaces": True}, "clean_up_tokenization_spaces is True"),
        ("x", {"do_sample": "yes"}, "do_sample is 'yes'; expected True or False"),
        ("x", {"truncation": True}, "truncation needs max_length"),
        ("x", {"truncation": "half", "max_length": 3}, "truncation is 'half'; expected True or"),
        ("x", {"eos_token_id": "1"}, "eos_token_id is '1'; expected a token id"),
        ("x", {"return_tensors": True, "return_full_text": True}, "each says what is returned"),
        ("Names", {"max_new_tokens": None, "max_length": 2}, "and max_length, 2 tokens, counts"),
        ("x", {"num_return_sequences": 0}, "num_return_sequences is 0"),
        ("x", {"num_return_sequences": 2, "do_sample": False}, "set do_sample=True"),
        ("x", {"temperature": 0.0}, "temperature is 0 with do_sample=True"),
        (["x", CHAT], {}, r"text_inputs mixes texts and chats: text_inputs\[0\] is 'x'; expected"),
        (CHAT[0], {}, r"text_inputs is .*\(dict\); expected a text, a list of texts, a chat"),
        ([{"text": "x"}], {}, r"text_inputs\[0\] is \{'text': 'x'\} \(dict\); expected a text"),
        ([[{"role": "user"}]], {}, r"text_inputs\[0\]\[0\] is \{'role': 'user'\} \(dict\)"),
        ([[]], {}, r"text_inputs\[0\] is \[\] \(list\); expected a text"),
        (5, {}, r"text_inputs is 5 \(int\); expected a text"),
        (None, {}, r"text_inputs is None \(NoneType\); expected a text"),
        (b"x", {}, r"text_inputs is b'x' \(bytes\); expected a text"),
        ([1, 2], {}, r"text_inputs\[0\] is 1 \(int\); expected a text"),
        (["x", None], {}, r"text_inputs mixes texts and chats: text_inputs\[0\] is 'x'"),
    ],
)
def test_what_cannot_be_is_refused(pipeline: Any, inputs: Any, settings: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipeline(inputs, **{"max_new_tokens": 2, **settings})


def test_an_unknown_keyword_is_refused_at_once(pipeline: Any) -> None:
    with pytest.raises(RequestError, match="unknown keyword argument beams"):
        TextGenerationPipeline(pipeline.generator, beams=3)

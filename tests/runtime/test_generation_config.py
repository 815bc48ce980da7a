"""generation_config.json, field by field, against transformers' own reading of it."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import gemma_deploy
from gemma_deploy.errors import ConfigError, GemmaDeployWarning
from gemma_deploy.runtime.generation_config import (
    FIELDS_WITHOUT_EFFECT,
    HONOURED_FIELDS,
    NEUTRAL_VALUES,
    GenerationDefaults,
)
from gemma_deploy.runtime.request import GenerationOptions

PROMPT = "The for statement"


def parse(**fields: Any) -> GenerationDefaults:
    return GenerationDefaults.parse(fields, "folder/generation_config.json")


def test_every_field_of_transformers_is_classified_once() -> None:
    config: Any = transformers.GenerationConfig
    fields = {name for name in vars(config()) if not name.startswith("_")}
    groups = [HONOURED_FIELDS, FIELDS_WITHOUT_EFFECT, frozenset(NEUTRAL_VALUES)]
    assert set().union(*groups) == fields
    assert sum(map(len, groups)) == len(fields)


def test_transformers_defaults_are_neutral() -> None:
    defaults = transformers.GenerationConfig._get_default_generation_params()
    honoured = {name: value for name, value in defaults.items() if name in HONOURED_FIELDS}
    assert parse(**defaults).ignored == ()
    assert set(honoured) == {
        *("max_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
    }


@pytest.mark.parametrize(
    ("fields", "given", "expected"),
    [
        # As Gemma 3's.
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {}, (1.0, 64, 0.95)),
        ({"do_sample": True, "top_k": 64.0, "temperature": 1}, {}, (1.0, 64, 1.0)),
        # What transformers' generate takes for a missing top_k.
        ({"do_sample": True, "temperature": 0.6}, {}, (0.6, 50, 1.0)),
        ({"do_sample": True, "top_k": 0}, {}, (1.0, 0, 1.0)),
        ({"do_sample": True, "temperature": 0.0}, {}, None),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5}, {}, None),
        ({"temperature": 0.6, "top_p": 0.9}, {}, None),
        ({}, {}, None),
        # A call's options win, field by field.
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {"temperature": 0}, None),
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {"top_k": 0}, (1.0, 0, 0.95)),
        ({"do_sample": True, "temperature": 0.6}, {"top_p": 0.5}, (0.6, 50, 0.5)),
        ({"do_sample": False, "top_k": 5}, {"temperature": 0.7}, (0.7, 5, 1.0)),
        ({}, {"temperature": 0.7}, (0.7, 0, 1.0)),
        ({}, {"top_k": 3}, (1.0, 3, 1.0)),
    ],
)
def test_sampling(fields: Any, given: Any, expected: Any) -> None:
    options = parse(**fields).over(GenerationOptions(**given))
    if expected is None:
        assert options.is_greedy
    else:
        assert not options.is_greedy
        assert (options.temperature, options.top_k, options.top_p) == expected


@pytest.mark.parametrize(
    ("fields", "given", "expected"),
    [
        ({}, {}, 256),
        ({"max_new_tokens": 7}, {}, 7),
        ({"max_new_tokens": 7.0}, {}, 7),
        ({"max_length": 30}, {}, 20),
        ({"max_length": 30, "max_new_tokens": 7}, {}, 7),
        ({"max_new_tokens": 7}, {"max_new_tokens": 3}, 3),
        ({"max_new_tokens": 7}, {"max_length": 30}, 20),
        ({"max_length": 30}, {"max_new_tokens": 3}, 3),
    ],
)
def test_lengths(fields: Any, given: Any, expected: int) -> None:
    assert parse(**fields).over(GenerationOptions(**given)).most_new_tokens(10) == expected


def test_the_rest_of_a_call_stays() -> None:
    given = GenerationOptions(seed=3, stop_token_ids=(9,), ignore_eos=True)
    options = parse(repetition_penalty=1.3).over(given)
    assert options.repetition_penalty == 1.3
    assert (options.seed, options.stop_token_ids, options.ignore_eos) == (3, (9,), True)
    plain = parse(repetition_penalty=1.3).over(GenerationOptions(repetition_penalty=1.0))
    assert plain.repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (None, set()),
        (1, {1}),
        ([1, 106], {1, 106}),
        ((1, np.int64(106)), {1, 106}),
        ([1.0], {1}),
        (-1, set()),
        ([], set()),
    ],
)
def test_ends_of_text(stated: Any, expected: set[int]) -> None:
    assert parse(eos_token_id=stated).eos_token_ids == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "hot"}, r"temperature is 'hot' \(str\); it must be a number"),
        ({"temperature": -1, "do_sample": True}, "temperature is -1; it must be 0"),
        ({"top_k": -1, "do_sample": True}, "top_k is -1; it must be 0 or more"),
        ({"top_k": 2.5}, r"top_k is 2.5 \(float\); it must be a whole number"),
        ({"top_p": [0.9]}, r"top_p is \[0.9\] \(list\)"),
        ({"max_new_tokens": True}, r"max_new_tokens is True \(bool\)"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"repetition_penalty": "1"}, r"repetition_penalty is '1' \(str\)"),
        ({"do_sample": 1}, r"do_sample is 1 \(int\); expected true or false"),
        ({"eos_token_id": "<eos>"}, "eos_token_id is '<eos>'; expected a token id"),
        ({"eos_token_id": [1, None]}, r"eos_token_id is \[1, None\]; expected a token id"),
        ({"eos_token_id": True}, "eos_token_id is True; expected a token id"),
    ],
)
def test_values_that_cannot_be_name_the_file(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^folder/generation_config.json: {message}.*correct"):
        parse(**fields)


@pytest.mark.parametrize(
    "fields", [{"temperature": 1e-6}, {"top_p": 0.0}, {"temperature": 0.0, "top_p": 0.5}]
)
def test_what_leaves_the_likeliest_token_alone_is_greedy(fields: Any) -> None:
    assert parse(do_sample=True, **fields).over(GenerationOptions()).is_greedy


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"top_k": -1, "temperature": -1.0}, ("top_k=-1", "temperature=-1.0")),
        ({"do_sample": False, "top_p": 0.0}, ("top_p=0.0",)),
        ({"encoder_repetition_penalty": 1.5}, ("encoder_repetition_penalty=1.5",)),
        ({"encoder_no_repeat_ngram_size": 2}, ("encoder_no_repeat_ngram_size=2",)),
        ({"min_p": 0.1, "no_repeat_ngram_size": 3}, ("min_p=0.1", "no_repeat_ngram_size=3")),
        ({"stop_strings": ["."], "num_beams": 4}, ("stop_strings=['.']", "num_beams=4")),
        ({"a_new_field": 1, "_private": 1}, ("a_new_field=1",)),
        ({"min_p": 0, "num_beams": 1.0, "suppress_tokens": [], "stop_strings": None}, ()),
        ({"cache_implementation": "hybrid", "transformers_version": "4.50", "pad_token_id": 0}, ()),
    ],
)
def test_what_changes_text_and_is_not_implemented(fields: Any, ignored: tuple[str, ...]) -> None:
    assert parse(**fields).ignored == ignored


def test_a_long_value_is_named_shortly() -> None:
    (ignored,) = parse(bad_words_ids=[[number] for number in range(9999)]).ignored
    assert ignored.startswith("bad_words_ids=[[0]")
    assert len(ignored) < 100


@pytest.fixture
def stated(tmp_path: Path, text_checkpoint: Any) -> Any:
    """Return `stated(**fields)`: the folder of a checkpoint with these in generation_config.json."""

    def write(**fields: Any) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(text_checkpoint("gemma1"), folder, dirs_exist_ok=True)
        (folder / "generation_config.json").write_text(json.dumps(fields))
        return folder

    return write


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 7},
        {"max_length": 19},
        {"max_new_tokens": 20, "repetition_penalty": 1.5},
        {"max_new_tokens": 20, "do_sample": False, "temperature": 2.0, "top_k": 3},
        # Sampled, with one outcome.
        {"max_new_tokens": 20, "do_sample": True, "top_k": 1},
        {"max_new_tokens": 20, "do_sample": True, "temperature": 0.0001},
    ],
)
def test_every_way_to_a_text_gives_transformers(stated: Any, fields: Any) -> None:
    folder = stated(**fields, eos_token_id=[1, 7], pad_token_id=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    (theirs,) = model.generate(**inputs)
    expected = tuple(theirs[inputs["input_ids"].shape[1] :].tolist())
    with gemma_deploy.load(folder, device="cpu", threads=1) as generator:
        assert generator.generate(PROMPT)[0].token_ids == expected
        with generator.stream(PROMPT) as stream:
            list(stream)
        assert stream.result.token_ids == expected
        pipeline = gemma_deploy.pipeline(model=generator)
        is_sampled = fields.get("do_sample", False)  # transformers' pipelines do by themselves
        (record,) = pipeline(PROMPT, return_tensors=True, do_sample=is_sampled)
        assert tuple(record["generated_token_ids"][-len(expected) :]) == expected
        chat = [{"role": "user", "content": PROMPT}]
        with generator.chat(chat) as answer:
            list(answer)
        if "max_new_tokens" in fields:
            assert len(answer.result.token_ids) == fields["max_new_tokens"]
        assert generator.answer([chat])[0].token_ids == answer.result.token_ids


def test_the_file_says_to_sample_and_a_call_can_say_no(stated: Any) -> None:
    folder = stated(do_sample=True, temperature=3.0, max_new_tokens=12)
    with gemma_deploy.load(folder, device="cpu", threads=1) as generator:
        texts = {generator.generate(PROMPT)[0].text for _ in range(4)}
        assert len(texts) > 1
        greedy = {generator.generate(PROMPT, temperature=0)[0].text for _ in range(3)}
        assert len(greedy) == 1


def test_a_model_warns_once_of_what_is_ignored(stated: Any) -> None:
    folder = stated(min_p=0.1, top_k=3)
    with pytest.warns(GemmaDeployWarning, match=r"json has fields .*ignored: min_p=0.1\.") as w:
        generator = gemma_deploy.load(folder, device="cpu", threads=1)
    assert len(w) == 1
    assert w[0].filename == __file__
    with generator, warnings.catch_warnings():
        warnings.simplefilter("error")
        generator.generate(PROMPT, max_new_tokens=2)
        gemma_deploy.pipeline(model=generator)(PROMPT, max_new_tokens=2)


def test_a_bad_file_is_refused_before_the_model_is_loaded(stated: Any) -> None:
    folder = stated(temperature="hot")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"generation_config\.json: temperature is 'hot'"):
        gemma_deploy.load(folder)

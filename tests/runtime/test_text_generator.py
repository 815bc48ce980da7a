import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from gemma_deploy.errors import (
    NonFiniteLogitsError,
    PromptTooLongError,
    RequestError,
)
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions.session import SessionLimits
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.text_generator import TextGenerator
from gemma_deploy.tokenizer import GemmaTokenizer

PROMPTS = ["The for statement", "Names", "The while statement is used for", "a tuple or a list"]


@pytest.fixture(scope="module")
def generator(text_bundle: Any) -> Iterator[TextGenerator]:
    with TextGenerator.open(ModelSource.open(text_bundle("gemma1")), threads=1) as generator:
        yield generator


def test_one_result_for_each_prompt(generator: TextGenerator) -> None:
    results = generator.generate(PROMPTS, max_new_tokens=12)
    assert [result.prompt for result in results] == PROMPTS
    for result in results:
        assert list(result.prompt_token_ids) == generator.tokenizer.encode(result.prompt)
        assert result.text == generator.tokenizer.decode(result.token_ids)
        assert len(result.token_ids) == 12
        assert result.finish_reason == "length"
        assert set(result.to_dict()) == {
            "prompt",
            "text",
            "prompt_token_ids",
            "token_ids",
            "finish_reason",
            "timings",
        }


def test_one_prompt_may_be_a_str(generator: TextGenerator) -> None:
    (alone,) = generator.generate(PROMPTS[0], max_new_tokens=5)
    assert alone.text == generator.generate(PROMPTS, max_new_tokens=5)[0].text
    assert generator.generate([]) == []


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_batch_size_does_not_change_the_text(
    generator: TextGenerator, sampling: Any, batch_size: int
) -> None:
    expected = [r.text for r in generator.generate(PROMPTS, max_new_tokens=12, **sampling)]
    results = generator.generate(PROMPTS, max_new_tokens=12, batch_size=batch_size, **sampling)
    assert [result.text for result in results] == expected


def test_each_batch_is_given_as_soon_as_it_is_done(
    scripted_generator: Any, scripted_session: Any
) -> None:
    generator = scripted_generator()
    results = generator.generate_each(["a", "b", "c"], batch_size=2, max_new_tokens=3)
    assert scripted_session.steps == []
    next(results)
    num_steps_of_first_batch = len(scripted_session.steps)
    assert num_steps_of_first_batch > 0
    next(results)
    assert len(scripted_session.steps) == num_steps_of_first_batch
    assert [result.prompt for result in results] == ["c"]
    assert len(scripted_session.steps) > num_steps_of_first_batch


def test_overrides_replace_options(generator: TextGenerator) -> None:
    options = GenerationOptions(max_new_tokens=9, temperature=1.0, seed=1)
    (result,) = generator.generate("Names", options, max_new_tokens=3)
    assert len(result.token_ids) == 3
    assert result.token_ids == generator.generate("Names", options)[0].token_ids[:3]


def is_word(generator: TextGenerator, token_id: int) -> bool:
    return generator.tokenizer.decode([token_id]).strip().isalnum()


def test_the_text_excludes_the_token_that_ended_it(generator: TextGenerator) -> None:
    (free,) = generator.generate("Names", max_new_tokens=12)
    # A token with a text of its own: it would show.
    index = next(i for i, t in enumerate(free.token_ids) if i > 3 and is_word(generator, t))
    stop = free.token_ids[index]
    assert stop not in free.token_ids[:index]
    (result,) = generator.generate("Names", max_new_tokens=12, stop_token_ids=(stop,))
    assert result.finish_reason == "stop"
    assert result.token_ids == free.token_ids[: index + 1]
    assert result.text == generator.tokenizer.decode(free.token_ids[:index])
    with generator.stream("Names", max_new_tokens=12, stop_token_ids=(stop,)) as stream:
        assert "".join(stream) == result.text


def test_the_models_own_ends_stop_unless_ignored(scripted_generator: Any) -> None:
    generator = scripted_generator()
    ids = generator.tokenizer.encode("Names")
    # The script says the sum of the ids plus one: pick the prompt's end so that this is id 7.
    filler = (7 - 1 - sum(ids)) % 512
    word = generator.tokenizer.id_to_token(filler).replace("\u2581", " ")
    prompt = "Names" + word
    assert generator.tokenizer.encode(prompt) == [*ids, filler]
    (result,) = generator.generate(prompt, max_new_tokens=4)
    assert (result.token_ids, result.text, result.finish_reason) == ((7,), "", "stop")
    (result,) = generator.generate(prompt, max_new_tokens=4, ignore_eos=True)
    assert (len(result.token_ids), result.finish_reason) == (4, "length")


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 0}])
def test_streamed_pieces_are_the_text(generator: TextGenerator, prompt: str, sampling: Any) -> None:
    options = GenerationOptions(max_new_tokens=30, ignore_eos=True, **sampling)
    (expected,) = generator.generate(prompt, options)
    stream = generator.stream(prompt, options)
    pieces = list(stream)
    assert all(pieces)
    assert len(pieces) > 5
    assert "".join(pieces) == stream.result.text == expected.text
    assert stream.result.token_ids == expected.token_ids
    assert stream.result.finish_reason == "length"


def test_pieces_come_as_soon_as_their_tokens(
    scripted_generator: Any, scripted_session: Any
) -> None:
    generator = scripted_generator()
    stream = generator.stream("Names", max_new_tokens=10)
    assert scripted_session.steps == []
    next(stream)
    assert len(scripted_session.steps) < 10


def test_closing_a_stream_keeps_what_there_was(generator: TextGenerator) -> None:
    stream = generator.stream(PROMPTS[0], max_new_tokens=30)
    with pytest.raises(RequestError, match="the stream has not ended"):
        _ = stream.result
    first = next(stream)
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.text == first
    assert list(stream) == []


def test_ctrl_c_returns_what_was_generated(scripted_generator: Any, scripted_session: Any) -> None:
    # Once: whatever runs after it would show.
    interrupts = iter([False] * 5 + [True])

    def interrupt(_: int) -> None:
        if next(interrupts, False):
            raise KeyboardInterrupt

    scripted_session.on_step = interrupt
    generator = scripted_generator()
    results = generator.generate(PROMPTS, max_new_tokens=4, batch_size=1)
    reasons = [result.finish_reason for result in results]
    assert reasons == ["length", "cancelled", "cancelled", "cancelled"]
    assert [len(result.token_ids) for result in results] == [4, 1, 0, 0]
    assert generator.generate("Names", max_new_tokens=4)[0].finish_reason == "length"


def test_cancelling_ends_the_call(generator: TextGenerator) -> None:
    results = generator.generate(PROMPTS, is_cancelled=lambda: True)
    assert [(r.finish_reason, r.token_ids) for r in results] == [("cancelled", ())] * 4
    stream = generator.stream("Names", is_cancelled=lambda: True)
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"


def test_control_tokens_of_a_prompt_are_text_where_that_is_asked_for(
    generator: TextGenerator,
) -> None:
    end = generator.tokenizer.token_to_id("<end_of_turn>")
    prompt = "Names<end_of_turn>"
    for call in (
        lambda **o: generator.generate(prompt, max_new_tokens=1, **o)[0],
        lambda **o: next(generator.generate_each(prompt, max_new_tokens=1, **o)),
        lambda **o: closed(generator.stream(prompt, max_new_tokens=1, **o)),
    ):
        assert end in call().prompt_token_ids
        assert end not in call(allow_special=False).prompt_token_ids
        assert generator.tokenizer.decode(call(allow_special=False).prompt_token_ids) == prompt


def closed(stream: Any) -> Any:
    stream.close()
    return stream.result


def test_an_empty_prompt_starts_from_bos(scripted_generator: Any) -> None:
    generator = scripted_generator()
    assert generator.generate("", max_new_tokens=2)[0].prompt_token_ids == (2,)
    assert closed(generator.stream("", max_new_tokens=2)).prompt_token_ids == (2,)
    # `<bos>` is not added by this one, but there is one.
    bare = generator.with_tokenizer(GemmaTokenizer())
    assert bare.generate("", max_new_tokens=2)[0].prompt_token_ids == (2,)
    nameless: Any = mock.create_autospec(GemmaTokenizer, instance=True)
    nameless.encode.side_effect = lambda text, **_: [5] * len(text)
    nameless.bos_token_id = nameless.eos_token_id = None
    nameless.end_of_turn_ids = frozenset()
    with pytest.raises(RequestError, match="prompt 2 is empty, and the tokenizer has no <bos>"):
        generator.with_tokenizer(nameless).generate(["Names", ""])


def test_progress_is_that_of_the_prompts(scripted_generator: Any) -> None:
    generator = scripted_generator(prefill_chunk=4)
    count = len(generator.tokenizer.encode("Names refer to objects."))
    assert count > 4
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    stream = generator.stream("Names refer to objects.", max_new_tokens=3, on_progress=tell)
    assert told == []
    list(stream)
    assert told[0] == (0, count)
    assert told[1] == (4, count)
    assert told[-1] == (count, count)
    told.clear()
    generator.generate(["Names"] * 3, max_new_tokens=3, batch_size=2, on_progress=tell)
    assert [done == total for done, total in told].count(True) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: g.generate(5), r"the prompts are 5 \(int\); expected a string or a list"),
        (lambda g: g.generate(None), r"the prompts are None \(NoneType\); expected a string"),
        (lambda g: g.generate(b"Names"), r"the prompts are b'Names' \(bytes\); expected a string"),
        (lambda g: g.generate({"a": 1}), r"the prompts are \{'a': 1\} \(dict\); expected a string"),
        (lambda g: g.generate(["Names", 5]), r"prompt 2 is 5 \(int\); expected a string"),
        (lambda g: g.stream(["Names"]), r"prompt 1 is \['Names'\] \(list\); expected a string"),
        (lambda g: g.generate("Names", top_q=3), "unknown option top_q; expected ignore_eos"),
        (lambda g: g.generate("Names", batch_size=0), "batch_size is 0; it must be at least 1"),
        (
            lambda g: g.generate("Names", batch_size="4"),
            r"batch_size is '4' \(str\); it must be a whole",
        ),
        (lambda g: g.generate("Names", max_new_tokens=0), "max_new_tokens is 0"),
    ],
)
def test_requests_that_cannot_be(generator: TextGenerator, call: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        call(generator)


def test_ids_beyond_the_embedding_are_refused(
    scripted_generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = scripted_generator()
    monkeypatch.setattr(generator.tokenizer, "encode", lambda *_, **__: [2, 512])
    with pytest.raises(RequestError, match=r"prompt 1 holds token id 512; .* ids 0 to 511"):
        generator.generate("anything")


def test_ids_the_tokenizer_does_not_have_are_no_text(
    text_checkpoint: Any, scripted_session: Any
) -> None:
    folder = text_checkpoint("gemma1")
    small = GemmaTokenizer()  # five tokens; the embedding has 512
    generator = TextGenerator(scripted_session, small, ModelSource.open(folder))
    scripted_session.vocab_size = 512
    stream = generator.stream("Names", max_new_tokens=9)
    text = "".join(stream)
    assert max(stream.result.token_ids) >= small.vocab_size
    assert text == stream.result.text == generator.generate("Names", max_new_tokens=9)[0].text


def test_a_long_prompt_is_refused_before_anything_runs(
    scripted_generator: Any, scripted_session: Any
) -> None:
    generator = scripted_generator(max_seq_len=16)
    with pytest.raises(PromptTooLongError, match="the KV cache holds 16"):
        generator.generate(["Names", "The for statement " * 9])
    assert scripted_session.steps == []


def test_max_seq_len_is_a_hard_capacity(text_bundle: Any) -> None:
    source = ModelSource.open(text_bundle("gemma1"))
    with TextGenerator.open(source, max_seq_len=16, threads=1) as generator:
        assert generator.max_seq_len == 16
        (result,) = generator.generate("Names", max_new_tokens=100)
        assert result.finish_reason == "length"
        assert len(result.prompt_token_ids) + len(result.token_ids) == 16 + 1
    with pytest.raises(RequestError, match="max_seq_len is 513; this model is made for 1 to 512"):
        TextGenerator.open(source, max_seq_len=513)


def test_the_cache_is_allocated_once(scripted_generator: Any, scripted_session: Any) -> None:
    generator = scripted_generator(max_seq_len=64)
    allocated: list[tuple[int, int]] = []
    new_cache = scripted_session.new_cache

    def counted(batch_size: int, max_seq_len: int) -> Any:
        allocated.append((batch_size, max_seq_len))
        return new_cache(batch_size, max_seq_len)

    scripted_session.new_cache = counted
    for _ in range(2):
        generator.generate(PROMPTS[:3], max_new_tokens=3)
        list(generator.stream("Names", max_new_tokens=3))
    assert allocated == [(3, 64)]


def test_nan_is_an_error_and_leaves_no_trace(
    scripted_generator: Any, scripted_session: Any
) -> None:
    generator = scripted_generator()
    expected = generator.generate("Names", max_new_tokens=3)[0].token_ids
    scripted_session.steps.clear()
    scripted_session.logits_at_step = {1: float("nan")}
    stream = generator.stream("Names", max_new_tokens=3)
    with pytest.raises(NonFiniteLogitsError, match="new token 2"):
        list(stream)
    assert generator.generate("Names", max_new_tokens=3)[0].token_ids == expected


def test_leaving_the_block_closes_the_session(
    scripted_generator: Any, scripted_session: Any
) -> None:
    with scripted_generator():
        assert not scripted_session.is_closed
    assert scripted_session.is_closed


def test_a_bundle_runs_without_torch(text_bundle: Any) -> None:
    program = """
import sys
import gemma_deploy
with gemma_deploy.load(sys.argv[1], threads=1) as generator:
    options = {"max_new_tokens": 4}
    print(len(generator.generate(["Names", "a tuple"], **options)[1].token_ids))
    sampling = {"temperature": 1.0, "top_p": 0.9, "top_k": 9, "seed": 0}
    stream = generator.stream("Names", **sampling, **options)
    print("".join(stream) == stream.result.text, len(stream.result.token_ids))
    list(generator.chat([{"role": "user", "content": "Names"}], repetition_penalty=1.1, **options))
    gemma_deploy.pipeline("text-generation", model=generator)("Names", max_new_tokens=2)
print(sorted(name for name in ("torch", "onnx", "transformers") if name in sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(text_bundle("gemma1"))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[:2] == ["4", "True 4"]
    assert "torch" not in done.stdout
    assert done.stderr == ""


def test_a_sessions_limits_hold(scripted_generator: Any, scripted_session: Any) -> None:
    scripted_session.limits = SessionLimits(max_batch_size=3, max_seq_len=96, max_step_tokens=5)
    capacities: list[tuple[int, int]] = []
    allocate = scripted_session.new_cache

    def new_cache(batch_size: int, max_seq_len: int) -> Any:
        capacities.append((batch_size, max_seq_len))
        return allocate(batch_size, max_seq_len)

    scripted_session.new_cache = new_cache
    generator = scripted_generator()
    assert generator.max_seq_len == 96
    results = generator.generate(PROMPTS, max_new_tokens=7, batch_size=8)
    assert [len(result.token_ids) for result in results] == [7] * 4
    assert capacities == [(3, 96)]  # the engine's own length, whatever a call needs
    assert max(rows for rows, _ in scripted_session.steps) == 3
    assert max(tokens for _, tokens in scripted_session.steps) == 5
    scripted_session.limits = SessionLimits()
    expected = scripted_generator().generate(PROMPTS, max_new_tokens=7)
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]


def test_a_request_beyond_the_engine_is_refused(
    scripted_generator: Any, scripted_session: Any
) -> None:
    scripted_session.limits = SessionLimits(max_seq_len=8)
    with pytest.raises(RequestError, match=r"max_seq_len is 9; .* 1 to 8 tokens .*engine's build"):
        scripted_generator(max_seq_len=9)
    generator = scripted_generator()
    with pytest.raises(PromptTooLongError, match=r"the KV cache holds 8: .*larger --max-seq-len"):
        generator.generate("Names " * 20)
    assert scripted_session.steps == []

"""One loaded model used from several threads: every text is what its prompt gets alone."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gemma_deploy.errors import RequestError, SessionError
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.runtime.streaming import TextStream
from gemma_deploy.runtime.text_generator import TextGenerator

PROMPTS = [
    "The for statement",
    "Names",
    "The while statement is used for",
    "a tuple or a list",
    "Text is Unicode.",
    "sequence",
    "expression is true",
    "objects",
]
DEADLINE_S = 60.0


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def generator(
    request: pytest.FixtureRequest, text_bundle: Any, text_checkpoint: Any
) -> Iterator[TextGenerator]:
    folder = (text_bundle if request.param == "onnxruntime" else text_checkpoint)("gemma3")
    with TextGenerator.open(ModelSource.open(folder), device="cpu", threads=1) as generator:
        yield generator


@pytest.fixture
def scripted(scripted_generator: Any) -> TextGenerator:
    """A generator whose model is a script; steps may be made to wait."""
    generator: TextGenerator = scripted_generator(prefill_chunk=4)
    return generator


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Run work(0), work(1), ... at the same time; return what they return."""
    barrier = threading.Barrier(count)

    def together(index: int) -> Any:
        barrier.wait(DEADLINE_S)
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(together, range(count)))


def streamed(stream: TextStream) -> str:
    return "".join(stream)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5, "seed": 3}])
def test_calls_of_eight_threads(generator: TextGenerator, sampling: Any) -> None:
    def lengths(index: int) -> list[int]:
        # Caches of several sizes replace each other.
        return [20 + 300 * ((turn + index) % 3) for turn in range(4)]

    def texts(index: int, many: bool) -> list[str]:
        options = {"ignore_eos": True, **sampling}
        if index % 2 and many:
            return [
                streamed(generator.stream(PROMPTS[index], max_new_tokens=n // 10, **options))
                for n in lengths(index)
            ]
        return [
            generator.generate(PROMPTS[index], max_new_tokens=n // 10, **options)[0].text
            for n in lengths(index)
        ]

    alone = [texts(index, many=False) for index in range(8)]
    assert in_threads(8, lambda index: texts(index, many=True)) == alone


def test_batches_and_chats_of_several_threads(generator: TextGenerator) -> None:
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:3]]

    def work(index: int) -> Any:
        if index == 0:
            return [r.text for r in generator.generate(PROMPTS, batch_size=3, max_new_tokens=12)]
        if index == 1:
            return [r.text for r in generator.answer(chats, max_new_tokens=12)]
        return streamed(generator.chat(chats[index - 2], max_new_tokens=12))

    alone = [work(index) for index in range(5)]
    assert in_threads(5, work) == alone


def test_streams_in_turn(generator: TextGenerator) -> None:
    options: Any = {"max_new_tokens": 20, "ignore_eos": True}
    alone = [generator.generate(prompt, **options)[0].text for prompt in PROMPTS[:3]]
    streams = [generator.stream(prompt, **options) for prompt in PROMPTS[:3]]
    texts = ["", "", ""]
    open_ones = [0, 1, 2]
    while open_ones:
        for index in tuple(open_ones):
            piece = next(streams[index], None)
            if piece is None:
                open_ones.remove(index)
            else:
                texts[index] += piece
        # A whole call between two pieces of the others.
        assert generator.generate(PROMPTS[0], **options)[0].text == alone[0]
    assert texts == alone
    assert {stream.result.finish_reason for stream in streams} == {"length"}


def test_each_piece_may_be_asked_for_by_another_thread(generator: TextGenerator) -> None:
    options: Any = {"max_new_tokens": 20, "ignore_eos": True}
    streams = [generator.stream(prompt, **options) for prompt in PROMPTS[:4]]

    def one_piece_of_each(_: int) -> list[tuple[int, str]]:
        found = []
        for index, stream in enumerate(streams):
            found += [(index, piece) for piece in [next(stream, None)] if piece is not None]
        return found

    while in_threads(6, one_piece_of_each) != [[]] * 6:
        pass
    for prompt, stream in zip(PROMPTS[:4], streams, strict=True):
        assert stream.result.text == generator.generate(prompt, **options)[0].text


def test_a_slow_reader_stalls_nobody(scripted: TextGenerator) -> None:
    stream = scripted.stream("Names", max_new_tokens=20)
    next(stream)
    (result,) = in_threads(1, lambda _: scripted.generate("Names", max_new_tokens=5))[0]
    assert result.finish_reason == "length"
    assert len(streamed(stream)) > 0


def test_a_stream_s_thread_does_not_keep_the_others_out(
    scripted: TextGenerator, scripted_session: Any
) -> None:
    """Streams of two threads advance alike, though each wants its next turn at once."""
    order: list[str] = []

    def read(index: int) -> None:
        stream = scripted.stream(PROMPTS[index], max_new_tokens=60, ignore_eos=True)
        order.extend("ab"[index] for _ in stream)

    scripted_session.on_step = lambda _: time.sleep(0.001)
    in_threads(2, read)
    half = order[: len(order) // 2]
    assert min(half.count("a"), half.count("b")) > len(half) // 4


def test_a_long_prompt_lets_others_in_between_its_chunks(
    scripted: TextGenerator, scripted_session: Any
) -> None:
    scripted_session.on_step = lambda _: time.sleep(0.001)
    long = scripted.stream("Names " * 30, max_new_tokens=1)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(streamed, long)
        while not scripted_session.steps:
            time.sleep(0.0005)
        with scripted.stream("Names", max_new_tokens=2) as short:
            next(short)
        assert not reading.done()
        reading.result(DEADLINE_S)


def test_results_of_one_iterator_go_to_whoever_asks(scripted: TextGenerator) -> None:
    alone = [r.text for r in scripted.generate(PROMPTS, max_new_tokens=4)]
    results = scripted.generate_each(PROMPTS, max_new_tokens=4, batch_size=2)
    found = [one for some in in_threads(4, lambda _: list(results)) for one in some]
    assert sorted(result.prompt for result in found) == sorted(PROMPTS)
    assert {result.prompt: result.text for result in found} == dict(
        zip(PROMPTS, alone, strict=True)
    )


def test_closing_the_model_waits_for_the_step_and_ends_the_others(
    scripted: TextGenerator, scripted_session: Any
) -> None:
    is_running, may_end = threading.Event(), threading.Event()

    def wait(step: int) -> None:
        assert not scripted_session.is_closed
        if step == 3:
            is_running.set()
            may_end.wait(DEADLINE_S)

    scripted_session.on_step = wait
    stream = scripted.stream("Names", max_new_tokens=60)
    with ThreadPoolExecutor(2) as pool:
        batch = pool.submit(scripted.generate, PROMPTS[:2], max_new_tokens=60)
        assert is_running.wait(DEADLINE_S)
        closing = pool.submit(scripted.close)
        time.sleep(0.05)
        assert not closing.done()
        assert not scripted_session.is_closed
        may_end.set()
        closing.result(DEADLINE_S)
        with pytest.raises(SessionError, match="the model is closed: load it again"):
            batch.result(DEADLINE_S)
    assert scripted_session.is_closed
    for call in (
        lambda: next(stream),
        lambda: scripted.generate("Names"),
        lambda: scripted.stream("Names"),
        lambda: scripted.chat([{"role": "user", "content": "Names"}]),
    ):
        with pytest.raises(SessionError, match="the model is closed"):
            call()
    assert stream.result.finish_reason == "cancelled"


def test_closing_a_stream_ends_the_thread_that_reads_it(
    scripted: TextGenerator, scripted_session: Any
) -> None:
    is_running, may_end = threading.Event(), threading.Event()

    def wait(step: int) -> None:
        if step == 2:
            is_running.set()
            may_end.wait(DEADLINE_S)

    scripted_session.on_step = wait
    stream = scripted.stream("Names " * 30, max_new_tokens=60)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(streamed, stream)
        assert is_running.wait(DEADLINE_S)
        closing = pool.submit(stream.close)
        time.sleep(0.05)
        may_end.set()
        closing.result(DEADLINE_S)
        assert reading.result(DEADLINE_S) == ""
    assert stream.result.finish_reason == "cancelled"
    assert len(scripted_session.steps) == 3  # of a prompt with many more chunks


def test_a_callback_may_use_the_model_and_not_its_own_stream(scripted: TextGenerator) -> None:
    (alone,) = scripted.generate("Names", max_new_tokens=4)
    inside: list[str] = []

    def is_cancelled() -> bool:
        if not inside:
            inside.append("")
            inside[0] = scripted.generate("Names", max_new_tokens=4)[0].text
        return False

    (result,) = scripted.generate("Names", max_new_tokens=4, is_cancelled=is_cancelled)
    assert [result.text, *inside] == [alone.text] * 2
    stream = scripted.stream("Names", is_cancelled=lambda: bool(next(stream)))
    with pytest.raises(RequestError, match="the stream was asked for more by something that it"):
        next(stream)

    def close() -> bool:
        closed.close()
        return False

    closed = scripted.stream("Names", max_new_tokens=9, is_cancelled=close)
    assert len(list(closed)) <= 1
    assert closed.result.finish_reason == "cancelled"


def test_a_stream_that_is_dropped_gives_its_cache_back(
    scripted: TextGenerator, scripted_session: Any
) -> None:
    caches: weakref.WeakSet[Any] = weakref.WeakSet()
    allocate = scripted_session.new_cache

    def new_cache(batch_size: int, max_seq_len: int) -> Any:
        cache = allocate(batch_size, max_seq_len)
        caches.add(cache)
        return cache

    scripted_session.new_cache = new_cache
    gc.collect()
    gc.disable()  # without its help
    try:
        for _ in range(5):
            for _ in scripted.stream("Names", max_new_tokens=9):
                break
        assert len(caches) == 1
        streams = [scripted.stream("Names", max_new_tokens=9) for _ in range(3)]
        for stream in streams:
            next(stream)
        assert len(caches) == 3
        del streams, stream
        assert len(caches) == 1
    finally:
        gc.enable()

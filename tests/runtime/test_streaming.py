import time
from collections.abc import Generator
from typing import Any

import numpy as np
import pytest

from gemma_deploy.errors import RequestError, SessionError
from gemma_deploy.runtime.generator import BatchGeneration
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.result import GenerationResult
from gemma_deploy.runtime.rows import Row
from gemma_deploy.runtime.streaming import TextStream


def to_result(row: Row, text: str) -> GenerationResult:
    return GenerationResult(
        prompt="",
        text=text,
        prompt_token_ids=(),
        token_ids=row.new_tokens,
        finish_reason=row.finish_reason or "cancelled",
        timings=row.timings(),
    )


def make_stream(row: Row, steps: Generator[object]) -> TextStream:
    """A stream in which the token 7 is the piece `7 `, and 0 is no piece."""
    return TextStream(
        row,
        steps,
        push=lambda token_id: f"{token_id} " if token_id else "",
        finish=lambda: "end",
        to_result=to_result,
    )


@pytest.fixture
def row() -> Row:
    return Row([1], 8, np.random.default_rng(0))


def test_pieces_are_never_empty(row: Row) -> None:
    def steps() -> Generator[object]:
        for token_id in (7, 0, 8):
            row.append(token_id)
            yield None
        row.append(9)
        row.finish("stop")
        yield None

    stream = make_stream(row, steps())
    assert list(stream) == ["7 ", "8 ", "end"]
    assert stream.result.text == "7 8 end"
    assert stream.result.token_ids == (7, 0, 8, 9)
    assert stream.result.finish_reason == "stop"


def test_after_an_error_the_result_is_what_there_was(row: Row) -> None:
    def steps() -> Generator[object]:
        row.append(7)
        yield None
        raise SessionError("the device is gone")

    stream = make_stream(row, steps())
    assert next(stream) == "7 "
    with pytest.raises(RequestError, match="the stream has not ended"):
        _ = stream.result
    with pytest.raises(SessionError, match="the device is gone"):
        next(stream)
    assert (stream.result.text, stream.result.finish_reason) == ("7 ", "cancelled")
    assert list(stream) == []


def test_closing_keeps_what_there_was(row: Row) -> None:
    def steps() -> Generator[object]:
        while True:
            row.append(7)
            yield None

    with make_stream(row, steps()) as stream:
        next(stream)
    assert (stream.result.text, stream.result.finish_reason) == ("7 ", "cancelled")
    result = stream.result
    stream.close()
    assert stream.result == result
    untouched = make_stream(Row([1], 8, np.random.default_rng(0)), steps())
    untouched.close()
    assert (untouched.result.text, untouched.result.token_ids) == ("", ())


def test_idle_time_is_no_part_of_the_timings(scripted_session: Any) -> None:
    idle_s = 0.2
    options = GenerationOptions(max_new_tokens=9)
    cache = scripted_session.new_cache(1, 16)
    batch = BatchGeneration(scripted_session, cache, [[1]], options)
    stream = make_stream(batch.rows[0], batch.steps())
    time.sleep(idle_s)
    next(stream)
    time.sleep(idle_s)
    stream.close()
    timings = stream.result.timings
    assert timings.new_tokens == 1
    assert timings.ttft_s is not None
    assert 0 < timings.ttft_s == timings.total_s < idle_s

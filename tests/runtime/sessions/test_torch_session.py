from typing import Any

import numpy as np
import pytest
import torch

from gemma_deploy.errors import BackendUnavailableError, RequestError, SessionError
from gemma_deploy.model.transformer import GemmaModel
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.generator import BatchGeneration
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions.torch_session import TorchSession
from tests.rounding import MODEL_FLOAT32, assert_near

NAMES = ["gemma1", "gemma2", "gemma3"]


@pytest.mark.parametrize("name", NAMES)
def test_ragged_rows_match_transformers(
    name: str, text_checkpoint: Any, oracle: Any, random_tokens: Any
) -> None:
    folder = text_checkpoint(name)
    session = TorchSession(folder, device=Device(kind="cpu"), dtype="float32")
    lengths = [3, 20, 11]
    tokens = random_tokens(3, 21)
    index = np.array([[length - 1] for length in lengths])
    cache = session.new_cache(3, 32)
    first = session.step(tokens[:, :20].numpy(), np.zeros(3, np.int64), index, cache).logits
    following = tokens[range(3), lengths][:, None]
    starts = np.array(lengths)
    second = session.step(following.numpy(), starts, np.zeros((3, 1), np.int64), cache).logits
    model = oracle(folder)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected = model(tokens[row : row + 1, : length + 1]).logits[0]
        assert_near(first[row, 0], expected[length - 1], roundings=MODEL_FLOAT32)
        assert_near(second[row, 0], expected[length], roundings=MODEL_FLOAT32)


def test_rows_of_a_cache_share_its_memory(text_checkpoint: Any, random_tokens: Any) -> None:
    session = TorchSession(text_checkpoint("gemma2"), device=Device(kind="cpu"))
    tokens = random_tokens(2, 9).numpy()
    whole, apart = session.new_cache(2, 16), session.new_cache(2, 16)
    index = np.full((1, 1), 8)
    together = session.step(tokens, np.zeros(2, np.int64), np.full((2, 1), 8), whole).logits
    for row in (1, 0):
        part = apart.rows(row, row + 1)
        assert (part.batch_size, part.max_seq_len) == (1, 16)
        alone = session.step(tokens[row : row + 1], np.zeros(1, np.int64), index, part).logits
        assert_near(alone[0], together[row], roundings=MODEL_FLOAT32)
    for key, other in zip(whole.static.keys, apart.static.keys, strict=True):
        assert_near(key[:, :, :9], other[:, :, :9], roundings=MODEL_FLOAT32)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_without_a_finite_embedding_harms_no_prompt_without_it(
    name: str, text_checkpoint: Any, random_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = TorchSession(text_checkpoint(name), device=Device(kind="cpu"), dtype="float32")
    tokens = random_tokens(3, 20).tolist()
    prompts = [row[:length] for row, length in zip(tokens, [3, 20, 11], strict=True)]

    def generate() -> list[tuple[int, ...]]:
        cache = session.new_cache(3, 32)
        # One row ends before the others.
        options = GenerationOptions(max_new_tokens=6)
        batch = BatchGeneration(session, cache, prompts, options, stop_token_ids=stop_token_ids)
        list(batch.steps())
        return [row.new_tokens for row in batch.rows]

    stop_token_ids: tuple[int, ...] = ()
    stop_token_ids = (generate()[1][1],)
    expected = generate()
    pad_token_id = 0
    assert all(pad_token_id not in row for row in expected)
    embed = GemmaModel.embed

    def poisoned(model: GemmaModel, input_ids: torch.Tensor) -> torch.Tensor:
        is_pad = (input_ids == pad_token_id)[..., None]
        return embed(model, input_ids).masked_fill(is_pad, float("nan"))

    monkeypatch.setattr(GemmaModel, "embed", poisoned)
    assert generate() == expected


def test_dtype_and_threads(text_checkpoint: Any) -> None:
    threads = torch.get_num_threads()
    try:
        session = TorchSession(
            text_checkpoint("gemma1"), device=Device(kind="auto"), dtype="bfloat16", threads=1
        )
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    cache = session.new_cache(1, 4)
    assert cache.static.keys[0].dtype == torch.bfloat16
    one = np.ones((1, 1), np.int64)
    logits = session.step(one, np.zeros(1, np.int64), np.zeros((1, 1), np.int64), cache).logits
    assert logits.dtype == torch.float32


def test_cuda_that_is_not_there_is_refused(
    text_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        BackendUnavailableError, match=r"cuda:1 is not available to torch .*device cpu"
    ):
        TorchSession(text_checkpoint("gemma1"), device=Device(kind="cuda", index=1))


def test_errors_of_use(text_checkpoint: Any) -> None:
    zero = np.zeros((1, 1), np.int64)
    with TorchSession(text_checkpoint("gemma1"), device=Device(kind="cpu")) as session:
        cache = session.new_cache(1, 4)
        with pytest.raises(SessionError, match="cache is a object; expected one from this session"):
            session.step(zero, np.zeros(1, np.int64), zero, object())  # type: ignore[arg-type]  # on purpose
        with pytest.raises(SessionError, match="torch failed on cpu"):
            session.step(zero, np.zeros(1, np.int64), np.full((1, 1), 7), cache)
        with pytest.raises(SessionError, match="cannot allocate a KV cache of 1 rows"):
            session.new_cache(1, 1 << 50)
    with pytest.raises(SessionError, match="the session is closed"):
        session.step(zero, np.zeros(1, np.int64), zero, cache)


def test_too_many_threads_are_refused(text_checkpoint: Any) -> None:
    with pytest.raises(RequestError, match="threads is 1,000; this process may use"):
        TorchSession(text_checkpoint("gemma1"), threads=1000)

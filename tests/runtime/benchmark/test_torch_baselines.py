"""The sessions of baselines compute what transformers computes, over a static cache."""

from typing import Any

import numpy as np
import pytest
import torch

from gemma_deploy.errors import SessionError
from gemma_deploy.runtime.benchmark.compiled_session import CompiledTorchSession
from gemma_deploy.runtime.benchmark.transformers_session import TransformersSession
from gemma_deploy.runtime.devices import Device
from tests.rounding import MODEL_FLOAT32, assert_near

PROMPT, CACHE = 20, 24

# Tracing imports parts of torch that warn of other parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


@pytest.fixture
def compiles_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace as torch.compile does, graph breaks being errors, but run without the slow compiler."""
    compile_ = torch.compile

    def traced(function: Any, *, mode: str, **options: Any) -> Any:
        assert mode == "reduce-overhead"
        return compile_(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)


@pytest.mark.usefixtures("compiles_eagerly")
@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@pytest.mark.parametrize("kind", [CompiledTorchSession, TransformersSession])
def test_prefill_and_decode_match_transformers(
    kind: type[CompiledTorchSession] | type[TransformersSession],
    name: str,
    text_checkpoint: Any,
    oracle: Any,
    random_tokens: Any,
) -> None:
    folder = text_checkpoint(name)
    session = kind(folder, device=Device(kind="cpu"), dtype="float32")
    model, cache = oracle(folder), session.new_cache(2, CACHE)
    for seed in range(2):  # a second prompt overwrites the first
        tokens = random_tokens(2, CACHE, seed)
        steps = [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, CACHE))]
        for start, stop in steps:
            found = session.step(
                tokens[:, start:stop].numpy(),
                np.full(2, start),
                np.full((2, 1), stop - start - 1),
                cache,
            ).logits
            with torch.no_grad():
                expected = model(tokens[:, :stop]).logits[:, -1:]
            assert found.dtype == torch.float32
            assert_near(found, expected, roundings=MODEL_FLOAT32)
    session.close()


@pytest.mark.usefixtures("compiles_eagerly")
@pytest.mark.parametrize("kind", [CompiledTorchSession, TransformersSession])
def test_what_a_baseline_never_needs_is_refused(kind: Any, text_checkpoint: Any) -> None:
    session = kind(text_checkpoint("gemma1"), device=Device(kind="cpu"))
    cache = session.new_cache(2, CACHE)
    ids, index = np.full((2, 4), 9), np.full((2, 1), 3)
    with pytest.raises(SessionError, match="expected rows of one length"):
        session.step(ids, np.array([0, 3]), index, cache)
    with pytest.raises(SessionError, match="expected rows of one length"):
        session.step(ids, np.array([5, 5]), index, cache)  # 5 tokens were never cached
    with pytest.raises(SessionError, match="expected one from this session's new_cache"):
        session.step(ids, np.array([0, 0]), index, object())


def test_transformers_takes_a_whole_cache_only(text_checkpoint: Any) -> None:
    session = TransformersSession(text_checkpoint("gemma1"), device=Device(kind="cpu"))
    cache = session.new_cache(2, CACHE)
    assert (cache.rows(0, 2), cache.batch_size, cache.max_seq_len) == (cache, 2, CACHE)
    with pytest.raises(SessionError, match="rows 0 to 0 of a cache of 2: transformers' cache can"):
        cache.rows(0, 1)


def test_a_compiled_step_gets_the_tensors_that_were_marked_for_cuda_graphs(
    text_checkpoint: Any,
) -> None:
    session = CompiledTorchSession(text_checkpoint("gemma1"), device=Device(kind="cpu"))
    cache = session.new_cache(2, CACHE)
    assert cache.rows(0, 2) is cache
    assert cache.rows(0, 1).batch_size == 1

import dataclasses
import json
import shutil
import weakref
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from gemma_deploy.bundle import Bundle
from gemma_deploy.errors import (
    BackendUnavailableError,
    BundleError,
    RequestError,
    SessionError,
    UnsafePathError,
)
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.manifest import MANIFEST_FILE
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.generator import BatchGeneration
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession
from gemma_deploy.runtime.sessions.torch_session import TorchSession
from tests.rounding import MODEL_FLOAT16, MODEL_FLOAT32, UNIT_ROUNDOFF, assert_near

# How many prompts for each. The last two have an lm_head of their own, and heads of 256 with a
# window of 16.
PARITY_MODELS = {
    "gemma1": 26,
    "gemma1-mha-bias": 26,
    "gemma2": 26,
    "gemma3": 26,
    "gemma1-untied": 8,
    "gemma2-h256": 8,
}
NEW_TOKENS = 32


def ragged_prompts(random_tokens: Any, count: int) -> list[list[int]]:
    """Prompts of 1 to 40 tokens: below, at and far past the tiny windows of 8 and 16."""
    tokens = random_tokens(count, 40).tolist()
    return [tokens[i][: 1 + (i * 7) % 40] for i in range(count)]


def greedy_texts(session: Any, prompts: list[list[int]], **arguments: Any) -> list[list[int]]:
    cache = session.new_cache(len(prompts), 96)
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    batch = BatchGeneration(session, cache, prompts, options, **arguments)
    for _ in batch.steps():
        pass
    return [list(row.new_tokens) for row in batch.rows]


def transformers_texts(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return texts up to where two tokens are so close that sums in another order may take either."""
    texts = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(output.logits)
        first, second = logits.topk(2).values.T
        is_close = (
            first - second <= 2 * MODEL_FLOAT32 * UNIT_ROUNDOFF["float32"] * logits.abs().max()
        )
        num_clear = int((~is_close).int().cumprod(0).sum())
        texts.append(output.sequences[0, len(prompt) :][:num_clear].tolist())
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("name", PARITY_MODELS)
def test_greedy_text_is_transformers(
    name: str, text_checkpoint: Any, onnxruntime_session: Any, oracle: Any, random_tokens: Any
) -> None:
    prompts = ragged_prompts(random_tokens, PARITY_MODELS[name])
    expected = transformers_texts(oracle(text_checkpoint(name)), prompts)
    # A model that repeats itself would prove nothing.
    assert np.mean([len(set(text)) for text in expected]) >= 20

    def cut(texts: list[list[int]]) -> list[list[int]]:
        return [text[: len(other)] for text, other in zip(texts, expected, strict=True)]

    session = onnxruntime_session(name)
    assert cut([greedy_texts(session, [prompt])[0] for prompt in prompts]) == expected
    for size, chunk in ((4, 512), (4, 7), (len(prompts), 512)):
        actual = [
            text
            for start in range(0, len(prompts), size)
            for text in greedy_texts(session, prompts[start : start + size], prefill_chunk=chunk)
        ]
        assert cut(actual) == expected
    both_graphs = onnxruntime_session(name, use_decode_graph=True)
    assert cut(greedy_texts(both_graphs, prompts)) == expected


def run_ids(session: Any, cache: Any, ids: Any, start: int, index: list[int]) -> Any:
    rows = ids.shape[0]
    return session.step(
        ids, np.full(rows, start), np.tile(np.array(index, np.int64), (rows, 1)), cache
    ).logits


@pytest.mark.parametrize("use_decode_graph", [False, True])
@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_prefill_equals_as_many_decode_steps(
    name: str, use_decode_graph: bool, onnxruntime_session: Any, random_tokens: Any
) -> None:
    session = onnxruntime_session(name, use_decode_graph=use_decode_graph)
    ids = random_tokens(3, 30).numpy()
    whole = run_ids(session, session.new_cache(3, 40), ids, 0, list(range(30))).copy()
    cache = session.new_cache(3, 40)
    for position in range(30):
        step = run_ids(session, cache, ids[:, position : position + 1], position, [0])
        assert_near(step[:, 0], whole[:, position], roundings=MODEL_FLOAT32)


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
@pytest.mark.parametrize("chunk", [5, 13])
def test_chunks_equal_the_whole_and_torch(
    name: str, chunk: int, text_checkpoint: Any, onnxruntime_session: Any, random_tokens: Any
) -> None:
    session = onnxruntime_session(name)
    ids = random_tokens(2, 30).numpy()
    oracle = TorchSession(text_checkpoint(name), device=Device(kind="cpu"), dtype="float32")
    expected = run_ids(oracle, oracle.new_cache(2, 30), ids, 0, list(range(30))).numpy()
    cache = session.new_cache(2, 30)
    for start in range(0, 30, chunk):
        part = ids[:, start : start + chunk]
        logits = run_ids(session, cache, part, start, list(range(part.shape[1])))
        assert_near(logits, expected[:, start : start + chunk], roundings=MODEL_FLOAT32)


def test_a_row_of_a_cache_is_written_in_place(onnxruntime_session: Any, random_tokens: Any) -> None:
    session = onnxruntime_session("gemma1")
    ids = random_tokens(3, 10).numpy()
    whole, apart = session.new_cache(3, 16), session.new_cache(3, 16)
    run_ids(session, whole, ids, 0, [9])
    for row in (2, 0, 1):
        run_ids(session, apart.rows(row, row + 1), ids[row : row + 1], 0, [9])
    for one, other in zip(whole.tensors, apart.tensors, strict=True):
        _, memory = one.owner
        _, other_memory = other.owner
        assert memory[:, :, :10].any()
        assert_near(memory[:, :, :10], other_memory[:, :, :10], roundings=MODEL_FLOAT32)
        assert not memory[:, :, 10:].any()


@pytest.mark.parametrize("name", ["gemma1", "gemma2"])
def test_what_lies_behind_a_rows_tokens_is_never_seen(
    name: str, onnxruntime_session: Any, random_tokens: Any
) -> None:
    session = onnxruntime_session(name)
    ids = random_tokens(2, 12).numpy()
    clean, dirty = session.new_cache(2, 16), session.new_cache(2, 16)
    for tensor in dirty.tensors:
        tensor.owner[1][:] = 100.0
    for start, stop in ((0, 10), (10, 11), (11, 12)):
        part = ids[:, start:stop]
        expected = run_ids(session, clean, part, start, [0]).copy()
        np.testing.assert_array_equal(run_ids(session, dirty, part, start, [0]), expected)


def test_logits_memory_is_used_again(onnxruntime_session: Any, random_tokens: Any) -> None:
    session = onnxruntime_session("gemma1")
    ids = random_tokens(2, 1).numpy()
    cache = session.new_cache(2, 8)
    first = run_ids(session, cache, ids, 0, [0])
    assert run_ids(session, cache, ids, 1, [0]) is first


@pytest.mark.parametrize("use_decode_graph", [False, True])
def test_the_last_cache_is_freed_before_the_next_is_allocated(
    use_decode_graph: bool,
    onnxruntime_session: Any,
    random_tokens: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = onnxruntime_session("gemma1", use_decode_graph=use_decode_graph)
    ids = random_tokens(2, 4).numpy()
    cache = session.new_cache(2, 8)
    expected = [run_ids(session, cache, ids, 0, [3]).copy()]
    expected += [run_ids(session, cache, ids[:, :1], 4, [0]).copy()]
    alive = [weakref.ref(tensor.owner[1]) for tensor in cache.tensors]
    del cache
    allocate = session._allocate

    def check_and_allocate(*arguments: Any) -> Any:
        assert [memory() for memory in alive] == [None] * len(alive)
        return allocate(*arguments)

    monkeypatch.setattr(session, "_allocate", check_and_allocate)
    cache = session.new_cache(2, 8)
    np.testing.assert_array_equal(run_ids(session, cache, ids, 0, [3]), expected[0])
    np.testing.assert_array_equal(run_ids(session, cache, ids[:, :1], 4, [0]), expected[1])


def test_a_step_beyond_the_cache_is_refused(onnxruntime_session: Any) -> None:
    session = onnxruntime_session("gemma1")
    cache = session.new_cache(1, 8)
    with pytest.raises(SessionError, match="2 tokens at position 7 do not fit a KV cache of 8"):
        run_ids(session, cache, np.ones((1, 2), np.int64), 7, [0])


def test_float32_has_no_attention_on_cuda(text_bundle: Any) -> None:
    bundle = Bundle.open(text_bundle("gemma1"))
    with pytest.raises(BackendUnavailableError, match=r"computes in float32.*--dtype float16"):
        OnnxRuntimeSession(bundle, device=Device(kind="cuda"))
    with OnnxRuntimeSession(bundle, threads=1) as session:
        assert session.device == Device(kind="cpu")


@pytest.mark.parametrize(
    ("version", "device", "message"),
    [
        ("1.31.1", "cuda", r"int8 cache run on the CPU only.*--cache-dtype float16"),
        (
            "1.26.0",
            "auto",
            r"ONNX Runtime 1\.26\.0 has no .*the first that has is 1\.27: pip install",
        ),
    ],
)
def test_where_an_int8_cache_cannot_be(
    version: str, device: Literal["auto", "cuda"], message: str, text_bundle: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(ort, "__version__", version)
    bundle = Bundle.open(text_bundle("gemma1"))
    precision = dataclasses.replace(bundle.manifest.precision, activations="float16", cache="int8")
    manifest = dataclasses.replace(bundle.manifest, precision=precision)
    int8 = dataclasses.replace(bundle, manifest=manifest)
    with pytest.raises(BackendUnavailableError, match=message):
        OnnxRuntimeSession(int8, device=Device(kind=device))


def test_a_closed_session_says_so(text_bundle: Any) -> None:
    with load(Bundle.open(text_bundle("gemma1"))) as session:
        cache = session.new_cache(1, 8)
    with pytest.raises(SessionError, match="the session is closed: load the model again"):
        run_ids(session, cache, np.ones((1, 1), np.int64), 0, [0])


def test_a_foreign_cache_is_refused(onnxruntime_session: Any) -> None:
    with pytest.raises(SessionError, match="cache is a list; expected one from this session"):
        run_ids(onnxruntime_session("gemma1"), [], np.ones((1, 1), np.int64), 0, [0])


def test_a_failure_in_the_graph_is_a_session_error(onnxruntime_session: Any) -> None:
    session = onnxruntime_session("gemma1")
    beyond = np.full((1, 1), 512, np.int64)
    with pytest.raises(SessionError, match=r"failed in prefill\.onnx with 1 rows of 1 tokens"):
        run_ids(session, session.new_cache(1, 8), beyond, 0, [0])


@pytest.fixture
def changed_bundle(tmp_path: Path, text_bundle: Any) -> Any:
    """Return a function that changes a graph of a copied bundle and opens the copy."""

    def change(edit: Any) -> Bundle:
        folder = tmp_path / "bundle"
        shutil.copytree(text_bundle("gemma1"), folder)
        graph = folder / "prefill.onnx"
        model = onnx.load(graph, load_external_data=False)
        edit(model)
        graph.write_bytes(model.SerializeToString())
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        manifest["files"]["prefill.onnx"]["size_bytes"] = graph.stat().st_size
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
        return Bundle.open(folder)

    return change


def load(bundle: Bundle) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(bundle, device=Device(kind="cpu"), threads=1)


def test_external_data_outside_the_bundle_is_refused(changed_bundle: Any) -> None:
    def point_outside(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(e for e in tensor.external_data if e.key == "location").value = "../secret"

    with pytest.raises(UnsafePathError, match="leads out of the bundle"):
        load(changed_bundle(point_outside))


def test_graphs_of_another_spec_are_refused(changed_bundle: Any) -> None:
    def rename(model: onnx.ModelProto) -> None:
        name = model.graph.input[1].name
        model.graph.input[1].name = "positions"
        for node in model.graph.node:
            node.input[:] = ["positions" if n == name else n for n in node.input]

    with pytest.raises(BundleError, match=r"prefill\.onnx has the inputs .*positions.*; expected"):
        load(changed_bundle(rename))


def test_graphs_of_another_shape_are_refused(changed_bundle: Any) -> None:
    def widen(model: onnx.ModelProto) -> None:
        cache = next(i for i in model.graph.input if i.name == "past_key_values.0.key")
        cache.type.tensor_type.shape.dim[3].ClearField("value")
        cache.type.tensor_type.shape.dim[3].dim_value = 32

    with pytest.raises((BundleError, SessionError)) as caught:
        load(changed_bundle(widen))
    assert "past_key_values.0.key" in str(caught.value)


def test_a_graph_that_is_no_graph_is_refused(changed_bundle: Any) -> None:
    def empty(model: onnx.ModelProto) -> None:
        model.graph.node[0].input.append("no_such_value")

    with pytest.raises(SessionError, match=r"cannot load .*prefill\.onnx.*gemma-deploy verify"):
        load(changed_bundle(empty))


@pytest.mark.gpu
def test_cuda_gives_the_logits_of_the_cpu(
    tmp_path: Path, text_checkpoint: Any, random_tokens: Any
) -> None:
    bundle = export_checkpoint(text_checkpoint("gemma1"), tmp_path / "bundle", dtype="float16")
    prompts = ragged_prompts(random_tokens, 8)
    logits = {}
    for kind in ("cpu", "cuda"):
        with OnnxRuntimeSession(bundle, device=Device(kind=kind)) as session:
            ids = random_tokens(3, 30).numpy()
            logits[kind] = run_ids(session, session.new_cache(3, 40), ids, 0, [29]).copy()
            assert [len(text) for text in greedy_texts(session, prompts)] == [NEW_TOKENS] * 8
    assert_near(logits["cuda"], logits["cpu"], roundings=MODEL_FLOAT16, dtype="float16")


def test_too_many_threads_are_refused(text_bundle: Any) -> None:
    with pytest.raises(RequestError, match="threads is 1,000; this process may use"):
        OnnxRuntimeSession(Bundle.open(text_bundle("gemma1")), threads=1000)

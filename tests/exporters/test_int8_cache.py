"""Bundles with an int8 KV cache, against transformers with a cache that rounds in the same places."""

import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma_deploy.bundle import WEIGHTS_FILE, Bundle
from gemma_deploy.errors import RequestError
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.graph_spec import Phase, cache_scale_names

# Every generation; GQA and MHA, biases, head sizes 64 and 256, softcaps and windows.
MODELS = ["gemma1", "gemma1-mha-bias", "gemma2-h256", "gemma3"]
NUM_TOKENS = 40
CAPACITY = 48
# Sums in another order take some keys and values to the next code, and with them some of later layers. That
# is a whole step for each, where rounding moves each by the root of 1/12 of one: so this share of what all
# rounding does to the logits, if one code in a hundred is another. Without any rounding it is all.
SHARE = (12 * 0.01) ** 0.5
SINKS = 11  # which input of GroupQueryAttention

Checkpoints = Callable[[str], Path]
Oracle = Callable[..., Any]
OpenGraph = Callable[..., Any]
RandomTokens = Callable[..., Tensor]


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def int8_bundle(
    tiny_checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return `int8_bundle(name) -> folder`, weights in float32 and two lowerings."""

    @functools.cache
    def get(name: str) -> Path:
        folder = tmp_path_factory.mktemp("int8") / name
        export_checkpoint(
            tiny_checkpoint(name), folder, dtype="float32", cache_dtype="int8", graphs=["portable"]
        )
        return folder

    return get


def reference(model: Any, tokens: Tensor, scales: dict[str, Tensor] | None = None) -> Tensor:
    """Return transformers' logits [B, S, V]; given scales, with keys and values as codes say."""
    import transformers

    class RoundingCache(transformers.DynamicCache):
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            if scales is not None:
                key_scale, value_scale = (scales[x][:, None] for x in cache_scale_names(layer_idx))
                key_states = rounded(key_states, key_scale)
                value_states = rounded(value_states, value_scale)
            updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx)
            return updated

    with torch.no_grad():
        logits: Tensor = model(tokens, past_key_values=RoundingCache()).logits
    return logits


def rounded(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows / scale).round().clamp(-128, 127) * scale


def scales_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for k, v in load_file(folder / WEIGHTS_FILE).items() if "cache_scale" in k}


def mean_difference(actual: Any, wanted: Tensor) -> float:
    return float((torch.as_tensor(actual) - wanted).abs().mean())


def check(actual: Any, wanted: Tensor, exact: Tensor) -> None:
    """Compare logits with those of rounded keys and values, by the distance from those of exact ones."""
    assert mean_difference(actual, wanted) < SHARE * mean_difference(exact, wanted)
    atol = SHARE * float((exact - wanted).abs().max())
    torch.testing.assert_close(torch.as_tensor(actual), wanted, rtol=0, atol=atol)


def test_a_prompt_reads_rounded_keys_and_values(
    name: str,
    int8_bundle: Checkpoints,
    tiny_checkpoint: Checkpoints,
    oracle: Oracle,
    random_tokens: RandomTokens,
    open_graph: OpenGraph,
) -> None:
    folder, model = int8_bundle(name), oracle(tiny_checkpoint(name))
    tokens = random_tokens(2, NUM_TOKENS)
    wanted = reference(model, tokens, scales_of(folder))
    graph = open_graph(folder, "prefill")
    positions = np.tile(np.arange(NUM_TOKENS), (2, 1))
    logits, cache = graph.run(tokens, [0, 0], graph.new_cache(2, CAPACITY), positions)
    assert all(x.dtype == np.int8 for x in cache)
    check(logits, wanted, reference(model, tokens))


def test_rows_of_different_lengths_go_on_token_by_token_in_both_graphs(
    name: str,
    int8_bundle: Checkpoints,
    tiny_checkpoint: Checkpoints,
    oracle: Oracle,
    random_tokens: RandomTokens,
    open_graph: OpenGraph,
) -> None:
    folder = int8_bundle(name)
    prefill, decode = (open_graph(folder, phase) for phase in ("prefill", "decode"))
    tokens = random_tokens(3, NUM_TOKENS)
    model = oracle(tiny_checkpoint(name))
    wanted, exact = reference(model, tokens, scales_of(folder)), reference(model, tokens)
    lengths, rows = np.array([5, 12, 21]), np.arange(3)
    padded = np.where(np.arange(21) < lengths[:, None], tokens[:, :21], 0)
    logits, cache = prefill.run(
        padded, [0, 0, 0], prefill.new_cache(3, CAPACITY), lengths[:, None] - 1
    )
    found, positions = [(logits, logits)], [lengths - 1]
    for pos in (lengths + step for step in range(NUM_TOKENS - 21)):
        one_token = tokens[rows, pos][:, None]
        by_prefill, _ = prefill.run(one_token, pos, cache, [[0]] * 3)
        logits, cache = decode.run(one_token, pos, cache)
        found.append((logits, by_prefill))
        positions.append(pos)
    at = rows[:, None], np.stack(positions, axis=1)
    for by_graph in zip(*found, strict=True):
        check(np.concatenate(by_graph, axis=1), wanted[at], exact[at])


def test_prompts_split_in_chunks(
    name: str,
    int8_bundle: Checkpoints,
    tiny_checkpoint: Checkpoints,
    oracle: Oracle,
    random_tokens: RandomTokens,
    open_graph: OpenGraph,
) -> None:
    folder = int8_bundle(name)
    graph, tokens = open_graph(folder, "prefill"), random_tokens(1, NUM_TOKENS)
    model = oracle(tiny_checkpoint(name))
    wanted = reference(model, tokens, scales_of(folder))
    cache, found = graph.new_cache(1, CAPACITY), []
    for start, stop in itertools.pairwise((0, 3, 4, 21, NUM_TOKENS)):
        index = np.arange(stop - start)[None]
        logits, cache = graph.run(tokens[:, start:stop], [start], cache, index)
        found.append(logits)
    check(np.concatenate(found, axis=1), wanted, reference(model, tokens))


def test_caches_bound_in_place(
    int8_bundle: Checkpoints, random_tokens: RandomTokens, open_graph: OpenGraph
) -> None:
    """Outputs in the memory of the inputs change no bit, in either branch and either graph."""
    folder, tokens = int8_bundle("gemma2-h256"), random_tokens(1, 30).numpy()
    steps: list[tuple[Phase, int, int]] = [
        ("prefill", 0, 20),
        ("prefill", 20, 21),
        ("decode", 21, 22),
        ("prefill", 22, 30),
    ]
    cache = open_graph(folder, "prefill").new_cache(1, CAPACITY)
    in_place = copy.deepcopy(cache)
    for phase, start, stop in steps:
        graph = open_graph(folder, phase)
        index = [[stop - start - 1]] if phase == "prefill" else None
        logits, cache = graph.run(tokens[:, start:stop], [start], cache, index)
        bound = graph.run_in_place(tokens[:, start:stop], [start], in_place, index)
        np.testing.assert_array_equal(bound, logits)
        for ours, theirs in zip(in_place, cache, strict=True):
            np.testing.assert_array_equal(ours[:, :, :stop], theirs[:, :, :stop])


def test_one_token_multiplies_with_the_codes_as_they_lie(
    name: str, int8_bundle: Checkpoints
) -> None:
    """ONNX Runtime takes the slower, blockwise form where a head has no sink."""
    graph = onnx.load(int8_bundle(name) / "decode.onnx", load_external_data=False).graph
    constants = {x.name: x for x in graph.initializer}
    attentions = [x for x in graph.node if x.op_type == "GroupQueryAttention"]
    assert attentions
    for node in attentions:
        (num_heads,) = (x.i for x in node.attribute if x.name == "num_heads")
        sinks = onnx.numpy_helper.to_array(constants[node.input[SINKS]])
        assert sinks.tolist() == [-np.inf] * num_heads


def test_what_lies_beyond_the_scale_is_cut_off(
    int8_bundle: Checkpoints, random_tokens: RandomTokens, open_graph: OpenGraph
) -> None:
    """Keys and values of every channel fill a good part of the codes, and none wraps around."""
    folder, tokens = int8_bundle("gemma1"), random_tokens(2, NUM_TOKENS)
    graph = open_graph(folder, "prefill")
    _, cache = graph.run(tokens, [0, 0], graph.new_cache(2, NUM_TOKENS), [[0], [0]])
    for codes in cache:
        peaks = np.abs(codes.astype(int)).max(axis=(0, 2))
        assert (peaks > 20).all()
        assert np.median(peaks) < 80  # half of the range is headroom


def test_portable_graphs_cache_what_they_compute_in(int8_bundle: Checkpoints) -> None:
    manifest = Bundle.open(int8_bundle("gemma1")).manifest
    assert manifest.precision.cache == "int8"
    specs = {x: manifest.spec("decode", x).cache_inputs[0].dtype for x in manifest.lowerings}
    assert specs == {"onnxruntime": "int8", "portable": "float32"}
    portable = onnx.load(int8_bundle("gemma1") / "decode.portable.onnx", load_external_data=False)
    assert not any("cache_scale" in x.name for x in portable.graph.initializer)


def test_scales_are_measured_or_nothing_is_exported(
    tiny_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"int8 measures its scales.*--no-calibration"):
        export_checkpoint(
            tiny_checkpoint("gemma1"), tmp_path / "bundle", cache_dtype="int8", is_calibrated=False
        )
    assert not any(tmp_path.iterdir())

"""The exported graphs against transformers' eager float32, on ONNX Runtime's CPU."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemma_deploy.bundle import WEIGHTS_FILE
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.config import GemmaConfig
from gemma_deploy.exporters.onnx_graphs import write_graph
from gemma_deploy.exporters.tracing import trace_model
from gemma_deploy.exporters.weights import plan_weights
from gemma_deploy.graph_spec import DType, Phase, Precision, graph_spec
from tests.rounding import assert_logits_near

TinyFolders = Callable[..., Path]
RandomTokens = Callable[..., Tensor]
# Every generation; MHA, GQA, MQA; head sizes 16, 64 and 256; biases; an untied head; windows 8, 16.
MODELS = [
    "gemma1",
    "gemma1-mha-bias",
    "gemma1-h256",
    "gemma1-untied",
    "gemma2",
    "gemma2-h256",
    "gemma3",
    "gemma3-h256",
]
GENERATIONS = ["gemma1", "gemma2", "gemma3"]
NARROW: list[tuple[str, DType]] = [
    ("gemma2", "float16"),
    ("gemma3", "float16"),
    ("gemma1-mha-bias", "bfloat16"),
]
NUM_TOKENS = 48  # three windows of the widest kind
CAPACITY = 60


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=GENERATIONS)
def generation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def reference(model: Any, tokens: Tensor) -> Tensor:
    """Return transformers' logits at every position, float32 [B, S, V]."""
    with torch.no_grad():
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def all_positions(rows: int, length: int) -> Any:
    return np.tile(np.arange(length), (rows, 1))


def test_whole_prefill(
    name: str,
    tiny_bundle: TinyFolders,
    tiny_checkpoint: TinyFolders,
    oracle: Any,
    random_tokens: RandomTokens,
    open_graph: Any,
) -> None:
    graph = open_graph(tiny_bundle(name), "prefill")
    tokens = random_tokens(2, NUM_TOKENS)
    logits, _ = graph.run(
        tokens, [0, 0], graph.new_cache(2, CAPACITY), all_positions(2, NUM_TOKENS)
    )
    assert logits.dtype == np.float32
    assert_logits_near(logits, reference(oracle(tiny_checkpoint(name)), tokens))


def test_ragged_prefill_and_decode_far_past_the_windows(
    name: str,
    tiny_bundle: TinyFolders,
    tiny_checkpoint: TinyFolders,
    oracle: Any,
    random_tokens: RandomTokens,
    open_graph: Any,
) -> None:
    """Rows of 5, 12 and 21 tokens, padded on the right, then one token at a time in both graphs."""
    prefill, decode = (open_graph(tiny_bundle(name), phase) for phase in ("prefill", "decode"))
    tokens = random_tokens(3, NUM_TOKENS)
    wanted = reference(oracle(tiny_checkpoint(name)), tokens)
    lengths = np.array([5, 12, 21])
    rows = np.arange(3)
    padded = np.where(np.arange(21) < lengths[:, None], tokens[:, :21], 0)
    last = lengths[:, None] - 1
    logits, cache = prefill.run(padded, [0, 0, 0], prefill.new_cache(3, CAPACITY), last)
    assert_logits_near(logits[:, 0], wanted[rows, lengths - 1])
    for step in range(NUM_TOKENS - 21):
        pos = lengths + step
        one_token = tokens[rows, pos][:, None]
        by_prefill, _ = prefill.run(one_token, pos, cache, [[0]] * 3)
        logits, cache = decode.run(one_token, pos, cache)
        assert logits.shape == (3, 1, 512)
        assert_logits_near(logits[:, 0], wanted[rows, pos])
        assert_logits_near(by_prefill[:, 0], wanted[rows, pos])


def test_prompts_split_in_chunks(
    generation: str,
    tiny_bundle: TinyFolders,
    tiny_checkpoint: TinyFolders,
    oracle: Any,
    random_tokens: RandomTokens,
    open_graph: Any,
) -> None:
    """One row, since ONNX Runtime continues several tokens of a single row only."""
    graph = open_graph(tiny_bundle(generation), "prefill")
    tokens = random_tokens(1, NUM_TOKENS)
    wanted = reference(oracle(tiny_checkpoint(generation)), tokens)
    cache, start = graph.new_cache(1, CAPACITY), 0
    for length in (3, 1, 17, 27):
        chunk = tokens[:, start : start + length]
        logits, cache = graph.run(chunk, [start], cache, all_positions(1, length))
        assert_logits_near(logits, wanted[:, start : start + length])
        start += length
    assert start == NUM_TOKENS


@pytest.mark.parametrize(
    "index", [[[0], [19]], [[19, 19, 19], [0, 0, 7]], [list(range(20))[::-1], list(range(20))]]
)
def test_logits_are_those_asked_for(
    index: list[list[int]],
    tiny_bundle: TinyFolders,
    tiny_checkpoint: TinyFolders,
    oracle: Any,
    random_tokens: RandomTokens,
    open_graph: Any,
) -> None:
    graph = open_graph(tiny_bundle("gemma3"), "prefill")
    tokens = random_tokens(2, 20)
    logits, _ = graph.run(tokens, [0, 0], graph.new_cache(2, 32), index)
    wanted = reference(oracle(tiny_checkpoint("gemma3")), tokens)
    assert_logits_near(
        logits, torch.stack([row[positions] for row, positions in zip(wanted, index, strict=True)])
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_caches_bound_in_place(
    dtype: DType, tiny_bundle: TinyFolders, random_tokens: RandomTokens, open_graph: Any
) -> None:
    """Outputs in the memory of the inputs change no bit, in prefill, in chunks and in decode."""
    folder = tiny_bundle("gemma2", dtype)
    tokens = random_tokens(2, 30).numpy()
    steps: list[tuple[Phase, int, int]] = [("prefill", 0, 20), ("decode", 20, 21)]
    for rows, extra in ((2, [("decode", 21, 22)]), (1, [("prefill", 21, 30)])):
        cache = open_graph(folder, "prefill").new_cache(rows, CAPACITY)
        in_place = copy.deepcopy(cache)
        for phase, start, stop in [*steps, *extra]:
            graph = open_graph(folder, phase)
            index = [[0, stop - start - 1]] * rows if phase == "prefill" else None
            arguments = (tokens[:rows, start:stop], [start] * rows)
            logits, cache = graph.run(*arguments, cache, index)
            bound = graph.run_in_place(*arguments, in_place, index)
            np.testing.assert_array_equal(bound, logits)
            for ours, theirs in zip(in_place, cache, strict=True):
                np.testing.assert_array_equal(ours[:, :, :stop], theirs[:, :, :stop])


@pytest.mark.parametrize(("name", "dtype"), NARROW)
def test_narrow_bundles(
    name: str,
    dtype: DType,
    tiny_bundle: TinyFolders,
    tiny_checkpoint: TinyFolders,
    oracle: Any,
    random_tokens: RandomTokens,
    open_graph: Any,
) -> None:
    """Against float32 with the same rounded matrices, so that only arithmetic differs.

    A bfloat16 bundle computes in float32 and is held to float32's tolerance.
    """
    model = copy.deepcopy(oracle(tiny_checkpoint(name)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.to(getattr(torch, dtype)))
    tokens = random_tokens(2, NUM_TOKENS)
    wanted = reference(model, tokens)
    activations: Literal["float32", "float16"] = "float16" if dtype == "float16" else "float32"
    prefill, decode = (open_graph(tiny_bundle(name, dtype), p) for p in ("prefill", "decode"))
    head = all_positions(2, 30)
    logits, cache = prefill.run(tokens[:, :30], [0, 0], prefill.new_cache(2, CAPACITY), head)
    assert logits.dtype == np.float32
    assert_logits_near(logits, wanted[:, :30], activations=activations)
    for pos in range(30, NUM_TOKENS):
        logits, cache = decode.run(tokens[:, pos : pos + 1], [pos, pos], cache)
        assert_logits_near(logits[:, 0], wanted[:, pos], activations=activations)


BUNDLES: list[tuple[str, DType]] = [("gemma1-untied", "float32"), ("gemma2", "float16")]
BUNDLES += [("gemma1-mha-bias", "bfloat16")]


@pytest.mark.parametrize(("name", "dtype"), BUNDLES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_inputs_and_outputs_are_those_of_the_spec(
    name: str, dtype: DType, phase: Phase, tiny_bundle: TinyFolders
) -> None:
    folder = tiny_bundle(name, dtype)
    graph = onnx.load(folder / f"{phase}.onnx", load_external_data=False).graph
    config = GemmaConfig.from_dict(json.loads((folder / "manifest.json").read_text())["model"])
    spec = graph_spec(config, phase, Precision.of(dtype).cache)
    for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
        assert [_described(value) for value in values] == [
            (tensor.name, tensor.dtype, tensor.dims) for tensor in tensors
        ]


def _described(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return value.name, str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), dims


@pytest.mark.parametrize(("name", "dtype"), BUNDLES)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_graphs_are_small_and_point_into_the_weights_file(
    name: str, dtype: DType, phase: Phase, tiny_bundle: TinyFolders
) -> None:
    folder = tiny_bundle(name, dtype)
    path = folder / f"{phase}.onnx"
    assert path.stat().st_size < 300_000
    graph = onnx.load(path, load_external_data=False).graph
    external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert all(tensor.ByteSize() <= 1024 for tensor in inside)
    constants = [a.t for node in graph.node for a in node.attribute if a.HasField("t")]
    assert all(tensor.ByteSize() <= 1024 for tensor in constants)
    weights = load_file(folder / "weights.safetensors")
    assert {tensor.name for tensor in external} == weights.keys()
    loaded = onnx.load(path).graph
    for tensor in loaded.initializer:
        if tensor.name in weights:
            wanted = weights[tensor.name].contiguous().view(torch.uint8).numpy().tobytes()
            assert tensor.raw_data == wanted, tensor.name
            assert list(tensor.dims) == list(weights[tensor.name].shape)


def test_graphs_say_nothing_of_the_machine_that_made_them(tiny_bundle: TinyFolders) -> None:
    for phase in ("prefill", "decode"):
        model = onnx.load(tiny_bundle("gemma3") / f"{phase}.onnx", load_external_data=False)
        assert model.producer_name == "gemma-deploy"
        text = model.SerializeToString()
        for trace in (b"/home/", b"/tmp/", b"/root/", b"site-packages", b"stack_trace", b".py"):
            assert trace not in text


def test_graphs_pass_the_checker(tiny_bundle: TinyFolders) -> None:
    for phase in ("prefill", "decode"):
        onnx.checker.check_model(tiny_bundle("gemma2") / f"{phase}.onnx")


@pytest.mark.parametrize(
    ("name", "per_layer", "rotary_bases"), [("gemma1", 0, 1), ("gemma2", 0, 1), ("gemma3", 4, 2)]
)
def test_heads_are_split_only_where_something_reads_them(
    name: str, per_layer: int, rotary_bases: int, tiny_bundle: TinyFolders
) -> None:
    """Norms of query and key, as Gemma 3 has them, do; rotation and attention take heads flat."""
    bundle = tiny_bundle(name)
    for phase in ("prefill", "decode"):
        graph = onnx.load(bundle / f"{phase}.onnx", load_external_data=False).graph
        count = sum(node.op_type == "Reshape" for node in graph.node)
        num_layers = sum(node.op_type == "GroupQueryAttention" for node in graph.node)
        assert count <= num_layers * per_layer + 2 * rotary_bases


@pytest.mark.parametrize(("name", "windows"), [("gemma2", [8, -1, 8]), ("gemma3", [8, -1, 8])])
def test_each_layer_attends_by_its_own_rules(
    name: str, windows: list[int], tiny_bundle: TinyFolders
) -> None:
    graph = onnx.load(tiny_bundle(name) / "decode.onnx", load_external_data=False).graph
    attributes = [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in graph.node
        if node.op_type == "GroupQueryAttention"
    ]
    assert [a["local_window_size"] for a in attributes] == windows
    softcap = 10.0 if name == "gemma2" else 0.0
    assert [a.get("softcap", 0.0) for a in attributes] == [softcap] * 3


def test_small_weights_are_neither_read_nor_merged(
    tiny_checkpoint: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of 16 makes q and k norms as small as shapes are; zeros of another bundle lie around."""
    checkpoint = Checkpoint.open(tiny_checkpoint("gemma3-h16"))
    precision = Precision.of("float32")
    plan = plan_weights(checkpoint, precision)
    weights = {tensor.name: (tensor, 4096 * number) for number, tensor in enumerate(plan)}
    (tmp_path / WEIGHTS_FILE).write_bytes(bytes(4096 * len(plan) + 1_000_000))
    monkeypatch.chdir(tmp_path)
    traced = trace_model(checkpoint.config, "decode", precision.activations)
    arguments = (precision, checkpoint.config, weights, tmp_path / "decode.onnx")
    write_graph(traced, "onnxruntime", *arguments)
    graph = onnx.load(tmp_path / "decode.onnx", load_external_data=False).graph
    assert weights.keys() <= {tensor.name for tensor in graph.initializer}

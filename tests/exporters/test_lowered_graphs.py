"""TensorRT and portable graphs against transformers' eager float32, on ONNX Runtime's CPU."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from gemma_deploy.engine_build import Attention
from gemma_deploy.graph_spec import DType, Phase
from tests.rounding import assert_logits_near

TinyFolders = Callable[..., Path]
RandomTokens = Callable[..., Tensor]
Activations = Literal["float32", "float16"]
# Every generation; MHA, GQA and MQA; biases, an untied head; windows and softcaps that bite.
NARROW: list[tuple[str, DType]] = [
    ("gemma1", "float16"),
    ("gemma1-mha-bias", "bfloat16"),
    ("gemma1-untied", "bfloat16"),
    ("gemma2", "float16"),
    ("gemma3", "float16"),
]
# None is the file's own node; native attention has no softcap.
ATTENTIONS: list[Attention | None] = [None, "native", "plugin", "auto"]
BUILT_FROM = [
    (*narrow, attention)
    for narrow in NARROW
    for attention in ATTENTIONS
    if (narrow[0], attention) != ("gemma2", "native")
]
NUM_TOKENS, CAPACITY = 48, 60


class OpenPhase(Protocol):
    """Opens the graph of a phase."""

    def __call__(self, phase: Phase) -> Any: ...


@pytest.fixture(scope="module")
def narrowed(tiny_checkpoint: TinyFolders, oracle: Any) -> Callable[[str, DType], Any]:
    """Return transformers' float32 model on matrices rounded as a bundle's, so only arithmetic differs."""

    def get(name: str, dtype: DType) -> Any:
        model = copy.deepcopy(oracle(tiny_checkpoint(name)))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(parameter.to(getattr(torch, dtype)))
        return model

    return get


def check_walk(
    open_phase: OpenPhase, model: Any, tokens: Tensor, activations: Activations = "float32"
) -> None:
    """Rows of 5, 12 and 21 tokens at once, 7 more of each at once, then one at a time."""
    prefill, decode = open_phase("prefill"), open_phase("decode")
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
    rows, lengths = np.arange(3), np.array([5, 12, 21])
    padded = np.where(np.arange(21) < lengths[:, None], tokens[:, :21], 0)
    cache = prefill.new_cache(3, CAPACITY)
    logits, cache = prefill.run(padded, [0, 0, 0], cache, lengths[:, None] - 1)
    assert logits.dtype == np.float32
    assert_logits_near(logits[:, 0], wanted[rows, lengths - 1], activations=activations)
    positions = lengths[:, None] + np.arange(7)
    chunk = tokens[rows[:, None], positions]
    logits, cache = prefill.run(chunk, lengths, cache, np.tile(np.arange(7), (3, 1)))
    assert_logits_near(logits, wanted[rows[:, None], positions], activations=activations)
    for step in range(NUM_TOKENS - 28):
        pos = lengths + 7 + step
        logits, cache = decode.run(tokens[rows, pos][:, None], pos, cache)
        assert_logits_near(logits[:, 0], wanted[rows, pos], activations=activations)


@pytest.mark.parametrize(("name", "dtype", "attention"), BUILT_FROM)
def test_what_engines_are_built_from(
    name: str,
    dtype: DType,
    attention: Attention | None,
    tiny_bundle: TinyFolders,
    narrowed: Any,
    random_tokens: RandomTokens,
    open_reference_graph: Any,
) -> None:
    """Computed in float32, so only the order of sums differs."""
    folder = tiny_bundle(name, dtype)
    check_walk(
        lambda phase: open_reference_graph(folder, phase, attention),
        narrowed(name, dtype), random_tokens(3, NUM_TOKENS),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_tensorrt_files_run_by_themselves(
    name: str,
    tiny_bundle: TinyFolders,
    narrowed: Any,
    random_tokens: RandomTokens,
    open_graph: Any,
) -> None:
    """By the function they carry, in float16."""
    folder = tiny_bundle(name, "float16")
    check_walk(
        lambda phase: open_graph(folder, phase, "tensorrt"),
        narrowed(name, "float16"), random_tokens(3, NUM_TOKENS), "float16",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), [*NARROW, ("gemma2", "float32"), ("gemma3", "float32")])
def test_portable_files(
    name: str,
    dtype: DType,
    tiny_bundle: TinyFolders,
    narrowed: Any,
    random_tokens: RandomTokens,
    open_graph: Any,
) -> None:
    folder = tiny_bundle(name, dtype)
    check_walk(
        lambda phase: open_graph(folder, phase, "portable"),
        narrowed(name, dtype), random_tokens(3, NUM_TOKENS),
        "float16" if dtype == "float16" else "float32",
    )  # fmt: skip


def test_portable_files_in_another_implementation_of_onnx(
    tiny_bundle: TinyFolders,
    tiny_checkpoint: TinyFolders,
    oracle: Any,
    random_tokens: RandomTokens,
    open_graph: Any,
) -> None:
    """ONNX's own reference: a prompt past the window, then rows of different lengths."""
    folder, tokens = tiny_bundle("gemma2"), random_tokens(2, 20)
    with torch.no_grad():
        wanted = oracle(tiny_checkpoint("gemma2"))(tokens, use_cache=False).logits
    graph = open_graph(folder, "prefill", "portable")
    reference = ReferenceEvaluator(onnx.load(folder / "prefill.portable.onnx"))
    lengths, rows = np.array([9, 12]), np.arange(2)[:, None]
    head = np.where(np.arange(12) < lengths[:, None], tokens[:, :12], 0)
    feeds = graph.feeds(head, [0, 0], graph.new_cache(2, 24), lengths[:, None] - 1)
    found: list[Any] = list(reference.run(None, feeds))
    logits, cache = found[0], found[1:]
    assert_logits_near(logits[:, 0], wanted[rows[:, 0], lengths - 1])
    positions = lengths[:, None] + np.arange(8)
    feeds = graph.feeds(tokens[rows, positions], lengths, cache, np.tile(np.arange(8), (2, 1)))
    logits = next(iter(reference.run(None, feeds)))
    assert_logits_near(logits, wanted[rows, positions])


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_portable_files_are_of_standard_operators_only(
    phase: Phase, tiny_bundle: TinyFolders
) -> None:
    path = tiny_bundle("gemma2", "float16") / f"{phase}.portable.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", 24)}
    assert not model.functions
    attentions = [node for node in model.graph.node if node.op_type == "Attention"]
    assert [len(node.input) for node in attentions] == [4] * 3  # a mask, and no nonpad_kv_seqlen


@pytest.mark.parametrize(
    ("name", "dtype", "windows", "softcap"),
    [("gemma2", "float16", [8, 0, 8], 10.0), ("gemma1-untied", "bfloat16", [0, 0, 0], 0.0)],
)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_nodes_of_tensorrt_files(
    phase: Phase,
    name: str,
    dtype: DType,
    windows: list[int],
    softcap: float,
    tiny_bundle: TinyFolders,
) -> None:
    path = tiny_bundle(name, dtype) / f"{phase}.tensorrt.onnx"
    onnx.checker.check_model(path)
    graph = onnx.load(path, load_external_data=False).graph
    attentions = [node for node in graph.node if node.op_type == "GemmaAttention"]
    assert {node.domain for node in attentions} == {"gemma_deploy"}
    attributes = [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in attentions
    ]
    assert [a["sliding_window"] for a in attributes] == windows
    assert [a["softcap"] for a in attributes] == [softcap] * 3
    assert all(0.1 < a["scale"] < 0.2 for a in attributes)
    inputs, outputs = ({value.name for value in x} for x in (graph.input, graph.output))
    for node in graph.node:
        if node.op_type == "TensorScatter":
            # The one form that TensorRT updates in place.
            assert node.input[0] in inputs
            assert node.output[0] in outputs

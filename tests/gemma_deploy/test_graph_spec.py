from pathlib import Path

import numpy as np
import onnx
import pytest

from gemma_deploy.config import GemmaConfig
from gemma_deploy.graph_spec import (
    DTYPE_BYTES,
    DType,
    Precision,
    cache_bytes,
    cache_names,
    graph_name,
    graph_spec,
)

CONFIG = GemmaConfig(
    vocab_size=100, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


def test_prefill_takes_and_gives_what_the_documents_say() -> None:
    spec = graph_spec(CONFIG, "prefill", "float16")
    cache = ("float16", ("B", 2, "T", 8))
    assert [(t.name, t.dtype, t.dims) for t in spec.inputs] == [
        ("input_ids", "int64", ("B", "S")),
        ("input_pos", "int64", ("B",)),
        ("logits_index", "int64", ("B", "L")),
        ("past_key_values.0.key", *cache),
        ("past_key_values.0.value", *cache),
        ("past_key_values.1.key", *cache),
        ("past_key_values.1.value", *cache),
    ]
    assert [(t.name, t.dtype, t.dims) for t in spec.outputs] == [
        ("logits", "float32", ("B", "L", 100)),
        ("present.0.key", *cache),
        ("present.0.value", *cache),
        ("present.1.key", *cache),
        ("present.1.value", *cache),
    ]


def test_decode_takes_one_token_and_no_index() -> None:
    spec = graph_spec(CONFIG, "decode", "float32")
    assert [(t.name, t.dims) for t in spec.inputs[:2]] == [
        ("input_ids", ("B", 1)),
        ("input_pos", ("B",)),
    ]
    assert spec.inputs[2:] == spec.cache_inputs
    assert spec.outputs[0].dims == ("B", 1, 100)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_cache_outputs_follow_their_inputs(phase: str) -> None:
    spec = graph_spec(CONFIG, phase, "float32")  # type: ignore[arg-type]  # a phase by name
    pairs = [pair for layer in range(2) for pair in cache_names(layer)]
    assert [t.name for t in spec.cache_inputs] == [past for past, _ in pairs]
    assert [t.name for t in spec.outputs[1:]] == [present for _, present in pairs]
    assert [t.dims for t in spec.cache_inputs] == [t.dims for t in spec.outputs[1:]]


@pytest.mark.parametrize(
    ("dtype", "activations"),
    [("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32")],
)
def test_bfloat16_is_for_storage_only(dtype: DType, activations: DType) -> None:
    assert Precision.of(dtype) == Precision(
        weights=dtype, activations=activations, cache=activations
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensorrt_computes_and_caches_in_the_weights_dtype(dtype: DType) -> None:
    precision = Precision.of(dtype)
    assert precision.of_lowering("tensorrt") == Precision(
        weights=dtype, activations=dtype, cache=dtype
    )
    assert precision.of_lowering("onnxruntime") == precision
    assert precision.of_lowering("portable") == precision


def test_graph_names() -> None:
    assert graph_name("prefill") == "prefill"
    assert graph_name("decode", "tensorrt") == "decode.tensorrt"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cache_bytes_are_those_of_the_arrays(dtype: DType) -> None:
    """Counted from the arrays a runtime allocates by the spec, with onnx's idea of element sizes."""
    sizes = {"B": 3, "T": 40}
    spec = graph_spec(CONFIG, "decode", dtype)
    numpy_dtype = onnx.helper.tensor_dtype_to_np_dtype(
        {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}.get(
            dtype, onnx.TensorProto.BFLOAT16
        )
    )
    arrays = [
        np.empty(
            [sizes[size] if isinstance(size, str) else size for size in tensor.dims], numpy_dtype
        )
        for tensor in spec.cache_inputs
    ]
    assert cache_bytes(CONFIG, dtype, 3, 40) == sum(array.nbytes for array in arrays)
    assert DTYPE_BYTES[dtype] == numpy_dtype.itemsize


def test_one_statement_of_tensor_names() -> None:
    """The ecosystem's names are spelled in graph_spec.py and nowhere else in the package."""
    root = Path(__file__).parents[2]
    rooms = (root / "gemma_deploy", root / "exporters", root / "runtime")
    spelled = {
        path.name
        for room in rooms
        for path in room.rglob("*.py")
        if '"past_key_values.' in path.read_text() or '"present.' in path.read_text()
    }
    assert spelled <= {"graph_spec.py"}

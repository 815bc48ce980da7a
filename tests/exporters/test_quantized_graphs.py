"""Graphs of quantized bundles against transformers over the dequantized weights, and their engines."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_deploy.bundle import WEIGHTS_FILE, Bundle
from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.config import CONFIG_FILE
from gemma_deploy.errors import RequestError
from gemma_deploy.exporters.bundle_files import BundlePlan, write_bundle
from gemma_deploy.exporters.engine import BuildOptions, build_engine
from gemma_deploy.exporters.weights import plan_weights
from gemma_deploy.graph_spec import LOWERINGS, PHASES, Phase, Precision
from gemma_deploy.inspection import inspect_folder
from gemma_deploy.quantization.codes import Quantized, dequantize, unpack
from gemma_deploy.quantization.formats import WeightFormat, scales_name
from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession
from gemma_deploy.safetensors_files import SINGLE_FILE
from tests.rounding import MODEL_FLOAT32, assert_near

if TYPE_CHECKING:
    from tests.conftest import Oracle
    from tests.exporters.conftest import Graphs, ReferenceGraphs

CAPACITY = 48
# One bundle with every format that TensorRT takes, by parts of names; what has none stays dense.
MIXED = {
    "embed_tokens": "int4/32",
    "layers.0.": "int4/64",
    "layers.1.self_attn": "int8/channel",
    "layers.1.mlp": "int8/32",
    "layers.2.mlp": "fp8/64",
    "layers.2.self_attn.q": "fp8/channel",
}


@pytest.fixture(scope="session")
def mixed(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return a bundle of all `MIXED`; the checkpoint of what its codes mean lies beside it."""
    checkpoint, folder = tiny_checkpoint("gemma3"), tmp_path_factory.mktemp("quantized") / "mixed"
    source, precision = Checkpoint.open(checkpoint), Precision.of_quantized(None, "float16")
    formats = {
        name: WeightFormat.parse(text)
        for name, info in source.tensors.items()
        for part, text in MIXED.items()
        if part in name and len(info.shape) == 2
    }
    plan = BundlePlan(
        source=source,
        precision=precision,
        lowerings=LOWERINGS,
        tensors=plan_weights(source, precision, formats),
        prepared={},
        method="rtn",
        scaling=None,
        overflow=None,
    )
    folder.mkdir()
    write_bundle(plan, folder, lambda *_: None)
    _write_meaning(checkpoint, folder, formats)
    return Bundle.open(folder)


def _write_meaning(checkpoint: Path, bundle: Path, formats: dict[str, WeightFormat]) -> None:
    stored, original = load_file(bundle / WEIGHTS_FILE), load_file(checkpoint / SINGLE_FILE)
    for name, tensor in original.items():
        if name in formats:
            codes = unpack(stored[name], formats[name])
            quantized = Quantized(codes, stored[scales_name(name)])
            original[name] = dequantize(quantized, formats[name])
        elif tensor.ndim == 2:
            original[name] = tensor.half().float()
    folder = meaning_of(bundle)
    folder.mkdir()
    save_file(original, folder / SINGLE_FILE, metadata={"format": "pt"})
    shutil.copyfile(checkpoint / CONFIG_FILE, folder / CONFIG_FILE)


def meaning_of(bundle: Path) -> Path:
    return bundle.with_name(f"{bundle.name}-dequantized")


def logits_of(graphs: dict[Phase, Any], tokens: Any) -> Any:
    """Prefill all but the last four tokens, then decode these; logits [S, V]."""
    cache = graphs["prefill"].new_cache(1, CAPACITY)
    split = tokens.shape[1] - 4
    index = np.arange(split)[None]
    found, cache = graphs["prefill"].run(tokens[:, :split], [0], cache, index)
    rows = [found[0]]
    for position in range(split, tokens.shape[1]):
        found, cache = graphs["decode"].run(tokens[:, position : position + 1], [position], cache)
        rows.append(found[0])
    return np.concatenate(rows)


def wanted(bundle: Bundle, tokens: Any, oracle: Oracle) -> Any:
    with torch.no_grad():
        return oracle(meaning_of(bundle.folder))(tokens).logits[0].numpy()


def test_graphs_mean_the_dequantized_weights(
    mixed: Bundle,
    open_graph: Graphs,
    open_reference_graph: ReferenceGraphs,
    random_tokens: Callable[..., Any],
    oracle: Oracle,
) -> None:
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        expected = oracle(meaning_of(mixed.folder))(tokens).logits[0].numpy()
    reference = {x: open_reference_graph(mixed.folder, x, "native") for x in PHASES}
    assert_near(logits_of(reference, tokens), expected, roundings=MODEL_FLOAT32)
    # Only keys and values are rounded to float16: two in each of three layers, and sums of them.
    portable = {x: open_graph(mixed.folder, x, "portable") for x in PHASES}
    assert_near(logits_of(portable, tokens), expected, roundings=20, dtype="float16")
    # Kernels round activations to 1/254 of the largest of a block, for 22 products one after another.
    onnxruntime = {x: open_graph(mixed.folder, x) for x in PHASES}
    share = np.abs(logits_of(onnxruntime, tokens) - expected).max() / np.abs(expected).max()
    assert share < 0.1


def test_the_cache_has_a_dtype_of_its_own(mixed: Bundle, open_graph: Graphs) -> None:
    for lowering, phase in itertools.product(LOWERINGS, PHASES):
        assert {x.dtype for x in mixed.manifest.spec(phase, lowering).cache_inputs} == {"float16"}
    types = {
        port.name: port.type for port in open_graph(mixed.folder, "decode").session.get_inputs()
    }
    assert types.pop("past_key_values.0.key") == "tensor(float16)"
    with OnnxRuntimeSession(mixed, threads=1, use_decode_graph=True) as session:
        cache = session.new_cache(1, CAPACITY)
        assert {tensor.dtype for tensor in cache.tensors} == {"float16"}
        zero = np.zeros(1, np.int64)
        logits = session.step(zero[None], zero, zero[None], cache).logits
    assert np.isfinite(logits).all()


def test_inspection_counts_weights_not_codes(mixed: Bundle) -> None:
    found = inspect_folder(mixed.folder)
    header = int.from_bytes((mixed.folder / WEIGHTS_FILE).read_bytes()[:8], "little") + 8
    assert found.weights_bytes == (mixed.folder / WEIGHTS_FILE).stat().st_size - header
    assert found.parameters == oracle_parameters(meaning_of(mixed.folder))
    assert found.matrices_by_format == {
        "int4/64": 7,
        "int8/channel": 4,
        "int8/32": 3,
        "fp8/64": 3,
        "int4/32": 1,
        "fp8/channel": 1,
    }
    # int4 and a float16 scale per 32.
    assert found.bits_by_group["embedding"] == 4.5
    assert found.bytes_by_dtype["int4/32"] == found.bytes_by_group["embedding"]
    assert sum(found.bytes_by_dtype.values()) == found.weights_bytes
    assert found.bits_per_weight == 8 * found.weights_bytes / found.parameters


def oracle_parameters(folder: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / SINGLE_FILE).values())


def test_an_engine_is_built_of_every_format(mixed: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(mixed.folder, tmp_path / "bundle"))
    options = BuildOptions(
        flavour="tensorrt-rtx", compute_capabilities=("8.9",), max_seq_len=64, attention="native"
    )
    built = build_engine(bundle, options).engine
    assert built.manifest.build.targets == ("8.9",)
    assert built.manifest.cache_dtype == "float16"
    assert built.changed_files() == []


def test_engines_of_fp8_weights_are_refused_for_gpus_without_it(mixed: Bundle) -> None:
    options = BuildOptions(
        flavour="tensorrt-rtx", compute_capabilities=("8.6",), max_seq_len=64, attention="native"
    )
    with pytest.raises(RequestError, match=r"need fp8, .* 8\.9 on, not 8\.6: export with --int8"):
        build_engine(mixed, options)

import dataclasses
from typing import Any

import numpy as np
import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.engine import EngineFolder
from gemma_deploy.errors import EngineError, SessionError
from gemma_deploy.runtime.cache_buffers import CacheBuffers
from gemma_deploy.runtime.sessions.engine_bindings import (
    PICKED,
    Binding,
    EngineTensor,
    block_bindings,
    cache_bindings,
    check_tensors,
    logits_output,
    pack,
    picked_outputs,
    token_inputs,
)
from gemma_deploy.tensorrt import load_library

SIZES = {"B": 3, "S": 7, "L": 2}


def network_tensors(engine: EngineFolder) -> list[EngineTensor]:
    """Return what TensorRT makes of the graph that an engine was built from.

    The engine itself can only be asked on a GPU; its network has the same inputs and outputs.
    """
    from gemma_deploy.exporters.engine.prepared_graph import prepare_graph

    library = load_library("tensorrt-rtx")
    module = library.module
    bundle = Bundle.open(engine.folder.parent.parent)
    graph, _ = prepare_graph(bundle, "prefill", engine.manifest.build, library)
    builder = module.Builder(library.log.logger)
    network = builder.create_network(0)
    parser = module.OnnxParser(network, library.log.logger)
    assert parser.load_model_proto(graph.proto)
    weights = np.memmap(graph.weights_path, np.uint8, "r")
    for item in graph.initializers:
        address = weights.ctypes.data + item.offset
        assert parser.load_initializer(item.name, address, item.size_bytes)
    assert parser.parse_model_proto()
    pairs = [(network.get_input(i), True) for i in range(network.num_inputs)]
    pairs += [(network.get_output(i), False) for i in range(network.num_outputs)]
    return [
        EngineTensor(
            name=tensor.name,
            is_input=is_input,
            dtype=tensor.dtype.name,
            shape=tuple(tensor.shape),
        )
        for tensor, is_input in pairs
    ]


@pytest.fixture(scope="module")
def tensors(text_engine: Any) -> list[EngineTensor]:
    return network_tensors(text_engine())


def make_cache(engine: EngineFolder) -> CacheBuffers:
    """Return a cache at made-up addresses: nothing is there to be read."""
    limits = engine.manifest.build.limits
    starts = iter(range(1 << 20, 1 << 30, 1 << 20))
    return CacheBuffers.allocate(
        engine.manifest.spec("prefill").cache_inputs,
        limits.max_batch_size,
        limits.max_seq_len,
        lambda _shape, _dtype: (next(starts), None),
    )


def test_tensorrts_own_tensors_are_the_manifests(
    text_engine: Any, tensors: list[EngineTensor]
) -> None:
    manifest = text_engine().manifest
    for phase in ("prefill", "decode"):
        check_tensors(manifest.spec(phase), tensors, "build it again")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("input_pos", {"dtype": "INT32"}, "has the input input_pos INT32 .* expected .* INT64"),
        ("logits", {"shape": (-1, -1, 77)}, r"output logits FLOAT \[-1, -1, 77\], expected"),
        ("top_indices", {"shape": (-1, 64)}, r"top_indices INT64 \[-1, 64\]"),
        ("past_key_values.1.key", {"dtype": "BF16"}, "past_key_values.1.key BF16 .* HALF"),
        ("present.0.value", {"is_input": True}, "the input present.0.value"),
        ("logits_sum", {"name": "sum"}, "differ in logits_sum, sum: build it again"),
    ],
)
def test_other_tensors_are_refused(
    name: str, change: Any, message: str, text_engine: Any, tensors: list[EngineTensor]
) -> None:
    changed = [
        dataclasses.replace(tensor, **change) if tensor.name == name else tensor
        for tensor in tensors
    ]
    assert changed != tensors
    with pytest.raises(EngineError, match=message):
        check_tensors(text_engine().manifest.spec("prefill"), changed, "build it again")


def test_every_tensor_is_bound_once(text_engine: Any, tensors: list[EngineTensor]) -> None:
    engine = text_engine()
    spec = engine.manifest.spec("prefill")
    inputs, _ = pack(token_inputs(spec), SIZES)
    outputs, _ = pack(picked_outputs(spec), SIZES)
    logits, _ = pack([logits_output(spec)], SIZES)
    bound = [
        *block_bindings(inputs, 0x1000, are_inputs=True),
        *cache_bindings(spec, make_cache(engine)),
        *block_bindings(outputs, 0x2000, are_inputs=False),
        *block_bindings(logits, 0x3000, are_inputs=False),
    ]
    assert sorted(binding.name for binding in bound) == sorted(t.name for t in tensors)
    by_name = {binding.name: binding for binding in bound}
    for tensor in tensors:
        assert (by_name[tensor.name].shape is not None) == tensor.is_input
    assert by_name["input_ids"] == Binding(name="input_ids", address=0x1000, shape=(3, 7))
    assert by_name["logits_index"].shape == (3, 2)
    assert logits["logits"].size_bytes == 4 * 3 * 2 * engine.manifest.model.vocab_size


def test_past_and_present_are_one_memory(text_engine: Any) -> None:
    engine = text_engine()
    cache = make_cache(engine)
    bound = {b.name: b for b in cache_bindings(engine.manifest.spec("decode"), cache)}
    for layer in range(engine.manifest.model.num_hidden_layers):
        for part in ("key", "value"):
            past = bound[f"past_key_values.{layer}.{part}"]
            assert past.address == bound[f"present.{layer}.{part}"].address
            assert past.shape == (4, 1, 96, 64)
    assert len({binding.address for binding in bound.values()}) == len(cache.tensors)


def test_rows_that_begin_between_are_refused(text_engine: Any) -> None:
    engine = text_engine()
    spec = engine.manifest.spec("prefill")
    cache = make_cache(engine)
    shifted = dataclasses.replace(cache.tensors[1], address=cache.tensors[1].address + 128)
    odd = dataclasses.replace(cache, tensors=(cache.tensors[0], shifted, *cache.tensors[2:]))
    with pytest.raises(SessionError, match=r"past_key_values.0.value begin at .* multiple of 256"):
        cache_bindings(spec, odd)
    assert cache_bindings(spec, cache.rows(1, 2))[0].shape == (1, 1, 96, 64)


def test_regions_are_apart_and_aligned(text_engine: Any) -> None:
    spec = text_engine().manifest.spec("prefill")
    for specs in (token_inputs(spec), picked_outputs(spec)):
        regions, size_bytes = pack(specs, SIZES)
        ends = 0
        for region in regions.values():
            assert region.offset % 256 == 0
            assert region.offset >= ends
            ends = region.offset + region.size_bytes
        assert ends == size_bytes
    assert tuple(tensor.name for tensor in picked_outputs(spec)) == PICKED
    assert [tensor.name for tensor in token_inputs(spec)] == [
        "input_ids",
        "input_pos",
        "logits_index",
    ]

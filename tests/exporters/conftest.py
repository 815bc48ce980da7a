"""Runs a bundle's graphs on ONNX Runtime itself, without the runtime that is built on them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from gemma_deploy.engine_build import Attention
from gemma_deploy.exporters.passes.attention import use_attention
from gemma_deploy.exporters.passes.cpu_reference import use_cpu_reference
from gemma_deploy.graph_spec import Lowering, Phase, graph_name

Array = npt.NDArray[Any]

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}


class Graph:
    """One graph of a bundle, on one CPU thread.

    Args:
        path: Its file, whose external data lies beside it.
        model: A serialized model to run in the file's place.
    """

    def __init__(self, path: Path, model: bytes | None = None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        # As the package does, or DequantizeLinear of constants runs at every step.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        folder_entry = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(folder_entry, str(path.parent))
        self.session = ort.InferenceSession(
            model or path, options, providers=["CPUExecutionProvider"]
        )

    @property
    def cache_names(self) -> list[str]:
        return [x.name for x in self.session.get_inputs() if x.name.startswith("past_key_values")]

    def new_cache(self, batch_size: int, capacity: int) -> list[Array]:
        """Caches full of garbage: nothing beyond a row's length may matter."""
        generator = np.random.default_rng(0)
        return [
            generator.normal(0, 10, (batch_size, x.shape[1], capacity, x.shape[3])).astype(
                _NUMPY_TYPES[x.type]
            )
            for x in self.session.get_inputs()
            if x.name in self.cache_names
        ]

    def feeds(
        self, input_ids: Any, input_pos: Sequence[int], cache: list[Array], index: Any = None
    ) -> dict[str, Array]:
        named = dict(zip(self.cache_names, cache, strict=True))
        if index is not None:
            named["logits_index"] = np.asarray(index, np.int64)
        return named | {
            "input_ids": np.asarray(input_ids, np.int64),
            "input_pos": np.asarray(input_pos, np.int64),
        }

    def run(
        self, input_ids: Any, input_pos: Sequence[int], cache: list[Array], index: Any = None
    ) -> tuple[Array, list[Array]]:
        """Return logits and the updated caches; `index` is `logits_index` of a prefill graph."""
        outputs = self.session.run(None, self.feeds(input_ids, input_pos, cache, index))
        return outputs[0], outputs[1:]

    def run_in_place(
        self, input_ids: Any, input_pos: Sequence[int], cache: list[Array], index: Any = None
    ) -> Array:
        """Return logits; the caches are updated where they are."""
        binding = self.session.io_binding()
        feeds = self.feeds(input_ids, input_pos, cache, index)
        values = {name: ort.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name in self.cache_names:
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), values[name])
        self.session.run_with_iobinding(binding)
        for array, name in zip(cache, self.cache_names, strict=True):
            array[...] = values[name].numpy()
        return binding.get_outputs()[0].numpy()  # type: ignore[no-any-return]  # onnxruntime is untyped


class Graphs(Protocol):
    """Loads a graph of a bundle on first use."""

    def __call__(self, folder: Path, phase: Phase, lowering: Lowering = "onnxruntime") -> Graph: ...


class ReferenceGraphs(Protocol):
    """Loads a TensorRT graph of a bundle on first use, rewritten to run on a CPU in float32.

    Without `attention` its nodes are those of the file, otherwise those of an engine's graph.
    """

    def __call__(self, folder: Path, phase: Phase, attention: Attention | None) -> Graph: ...


@pytest.fixture(scope="session")
def open_graph() -> Graphs:
    """Return `open_graph(folder, phase, lowering="onnxruntime") -> Graph`."""

    @functools.cache
    def get(folder: Path, phase: Phase, lowering: Lowering = "onnxruntime") -> Graph:
        return Graph(folder / f"{graph_name(phase, lowering)}.onnx")

    return get


@pytest.fixture(scope="session")
def open_reference_graph() -> ReferenceGraphs:
    """Return `open_reference_graph(folder, phase, attention) -> Graph`."""

    @functools.cache
    def get(folder: Path, phase: Phase, attention: Attention | None) -> Graph:
        path = folder / f"{graph_name(phase, 'tensorrt')}.onnx"
        model = ir.load(path)
        if attention is not None:
            use_attention(model, attention)
        use_cpu_reference(model)
        return Graph(path, ir.to_proto(model).SerializeToString())

    return get

"""Runs a bundle's graphs on ONNX Runtime itself, without the runtime that is built on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from gemma_deploy.graph_spec import Phase

Array = npt.NDArray[Any]

_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Graph:
    """One graph of a bundle, on one CPU thread."""

    def __init__(self, folder: Path, phase: Phase) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(
            folder / f"{phase}.onnx", options, providers=["CPUExecutionProvider"]
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

    def __call__(self, folder: Path, phase: Phase) -> Graph: ...


@pytest.fixture(scope="session")
def open_graph() -> Graphs:
    """Return `open_graph(folder, phase) -> Graph`."""
    graphs: dict[tuple[Path, Phase], Graph] = {}

    def get(folder: Path, phase: Phase) -> Graph:
        if (folder, phase) not in graphs:
            graphs[folder, phase] = Graph(folder, phase)
        return graphs[folder, phase]

    return get

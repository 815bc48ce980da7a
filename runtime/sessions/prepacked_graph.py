"""A graph loaded from weights that were packed before, or packed now for the next time."""

import logging
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from gemma_deploy.errors import BundleError, SessionError, warn
from gemma_deploy.file_identity import HeldFile, Snapshot
from gemma_deploy.file_records import FileRecord, sha256_of
from gemma_deploy.graph_spec import INPUT_IDS, LOGITS, LOGITS_INDEX, GraphSpec
from gemma_deploy.machine import read_cpu
from gemma_deploy.runtime.sessions.aligned_blobs import align_blobs
from gemma_deploy.runtime.sessions.onnxruntime_providers import (
    ORT_ERRORS,
    load_on_cpu,
    session_options,
)
from gemma_deploy.runtime.sessions.prepacked_cache import DATA_FILE, MODEL_FILE, PrepackedCache

_LOGGER: Final = logging.getLogger(__name__)
# To be raised with every change of what is written, or of the options that graphs are loaded with.
_FORMAT: Final = "1"
_SAVE_PACKED: Final = ("session.save_external_prepacked_constant_initializers", "1")
_DATA_NAME: Final = ("session.optimized_model_external_initializers_file_name", DATA_FILE)
# The data holds each tensor as it was and as it is multiplied: 16-bit weights, in 32 bits, twice.
_NEED_PER_WEIGHT_BYTE: Final = 5
_PROBE_DIMS: Final = {"B": 1, "S": 4, "L": 1, "T": 8}
_FIRST_PROBE_TOKEN: Final = 2


def load_prepacked(
    graph: Path,
    spec: GraphSpec,
    weights: FileRecord,
    snapshot: Snapshot,
    cache: PrepackedCache,
    threads: int | None,
) -> tuple[Any, HeldFile] | None:
    """Load a graph on the CPU, its packed weights mapped from a cache instead of held in memory.

    The first time, the graph is loaded as usual, its packed weights are written, and the logits of a
    probe must be the same bit for bit. Whatever fails is logged as a warning, never raised; a folder
    that other users can change is a `GemmaDeployWarning`.

    ONNX Runtime packs at every load all the same, one tensor at a time, and takes the file's copy only
    where its hash is that of what it packed: a file of another processor is slow, not wrong.

    Args:
        graph: The graph's file; its external data has been checked.
        spec: Its inputs and outputs.
        weights: What is known of the file of its external data.
        snapshot: What the bundle's files were when `weights` was read.
        cache: Where packed weights are kept.
        threads: Threads of the CPU kernels; None for one per core.

    Returns:
        The `onnxruntime.InferenceSession` and the file that it maps; None if the graph is to be loaded
        without the cache.

    Raises:
        BundleError: The bundle was replaced meanwhile: nothing was kept.
    """
    key = _key(graph, weights)
    access = cache.others_access(key)
    if access is not None:
        warn(
            f"{graph} is loaded without prepacked weights: {access}, and what is in the cache is run as "
            "it is. Choose a folder of your own, in folders that only you or root may write"
        )
        return None
    found = cache.find(key)
    if found is not None:
        try:
            return _load(found, threads)
        except (
            SessionError,
            OSError,
        ) as err:  # e.g. another process has just made room for its own
            _LOGGER.info("%s is written anew: %s", found, err)
            cache.discard(key)
    try:
        return cache.write(
            key,
            lambda folder: _pack(graph, spec, snapshot, folder, threads),
            source=graph,
            need_bytes=_NEED_PER_WEIGHT_BYTE * weights.size_bytes,
        )
    except (SessionError, OSError) as err:
        _LOGGER.warning("%s is loaded without prepacked weights: %s", graph, err)
        return None


def _load(folder: Path, threads: int | None) -> tuple[Any, HeldFile]:
    mapped = HeldFile(folder / DATA_FILE)
    return load_on_cpu(folder / MODEL_FILE, session_options(threads)), mapped


def _key(graph: Path, weights: FileRecord) -> dict[str, str]:
    """Return all that packed weights depend on."""
    cpu, features = read_cpu()
    return {
        "format": _FORMAT,
        "graph_sha256": sha256_of(graph),
        "weights_sha256": weights.sha256,
        "onnxruntime": ort.__version__,
        "onnxruntime_build": ort.get_build_info(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cpu_features": " ".join(features),
    }


def _pack(
    graph: Path, spec: GraphSpec, snapshot: Snapshot, folder: Path, threads: int | None
) -> tuple[Any, HeldFile]:
    """Write a graph and its packed weights into a folder; return the session of what was written.

    Raises:
        BundleError: The graph or its weights were replaced meanwhile: they are not what the key says.
        SessionError: ONNX Runtime cannot load the graph, or computes something else with the copy.
    """
    options = session_options(threads)
    options.optimized_model_filepath = str(folder / MODEL_FILE)
    options.add_session_config_entry(*_SAVE_PACKED)
    options.add_session_config_entry(*_DATA_NAME)
    # It is dropped at once: with all it has in memory it takes half as much again as any other.
    expected = _probe(lambda: load_on_cpu(graph, options), spec)
    align_blobs(folder / MODEL_FILE, folder / DATA_FILE)
    session, mapped = _load(folder, threads)
    if not np.array_equal(_probe(lambda: session, spec), expected, equal_nan=True):
        raise SessionError(
            f"ONNX Runtime {ort.__version__} computes other logits from packed weights that it saved "
            "itself: they are not kept"
        )
    snapshot.check(BundleError, "its weights were being packed")
    return session, mapped


def _probe(load: Callable[[], Any], spec: GraphSpec) -> npt.NDArray[np.float32]:
    """Return the logits after a few tokens: float32 [1, 1, V]."""
    feeds = {}
    for tensor in spec.inputs:
        shape = [_PROBE_DIMS[dim] if isinstance(dim, str) else dim for dim in tensor.dims]
        feeds[tensor.name] = np.zeros(shape, tensor.dtype)
    num_tokens = feeds[INPUT_IDS].size
    # Not the padding token: where its embedding is zero, so are the logits, whatever the weights.
    feeds[INPUT_IDS] += _FIRST_PROBE_TOKEN + np.arange(num_tokens)
    if LOGITS_INDEX in feeds:
        feeds[LOGITS_INDEX] += num_tokens - 1
    try:
        logits: npt.NDArray[np.float32] = load().run([LOGITS], feeds)[0]
    except ORT_ERRORS as err:
        raise SessionError(f"ONNX Runtime cannot run it: {err}") from err
    return logits

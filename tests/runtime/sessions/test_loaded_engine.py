"""The session's bookkeeping without a GPU: ONNX Runtime computes, at the addresses that were bound.

The device's memory is the host's here, and a plan is the bundle's own prefill graph. What a driver or
TensorRT would do is left to the tests on a GPU.
"""

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.errors import RequestError, SessionError
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.generator import BatchGeneration
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions import loaded_engine, tensorrt_session
from gemma_deploy.runtime.sessions.onnxruntime_session import OnnxRuntimeSession
from gemma_deploy.runtime.sessions.tensorrt_session import TensorRTSession
from gemma_deploy.tensorrt import load_library

PROMPTS = [[2, 71, 40, 9, 77], [2, 15], [2, *range(100, 110)]]
GPU = Gpu(name="RTX 4090", compute_capability=(8, 9), memory_bytes=24 << 30)


class HostMemory:
    """A block of the host's memory, as `DeviceMemory` and `PinnedMemory`."""

    def __init__(self, size_bytes: int, alive: "weakref.WeakSet[Any]") -> None:
        self.block = np.zeros(size_bytes + 256, np.uint8)
        self.address = -(-self.block.ctypes.data // 256) * 256
        self.size_bytes = size_bytes
        self._alive = alive
        alive.add(self)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        place = (self.address, False)
        return {"shape": (self.size_bytes,), "typestr": "|u1", "data": place, "version": 3}

    def free(self) -> None:
        self._alive.discard(self)


class HostDevice:
    """A `CudaDevice` whose work is done at once; a recording does it again."""

    is_capturing = False

    def __init__(self, _index: int) -> None:
        self.handle = 7
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.work: Callable[[], object] | None = None  # what was recorded

    def activate(self) -> None:
        """There is one device."""

    def allocate(self, size_bytes: int) -> HostMemory:
        return HostMemory(size_bytes, self.alive)

    allocate_pinned = allocate

    def create_stream(self) -> "HostDevice":
        return self

    def copy_to_device(self, target: int, source: int, size_bytes: int) -> None:
        if not HostDevice.is_capturing:
            view(target, np.uint8, (size_bytes,))[:] = view(source, np.uint8, (size_bytes,))

    copy_to_host = copy_to_device

    def synchronize(self) -> None:
        """Everything is done already."""

    def free(self) -> None:
        """The stream is nothing."""

    def capture(self, _stream: object, work: Callable[[], object]) -> "HostDevice":
        HostDevice.is_capturing = True
        work()
        HostDevice.is_capturing = False
        recorded = HostDevice(0)
        recorded.work = work
        return recorded

    def launch(self, _stream: object) -> None:
        assert self.work is not None
        self.work()


class HostContext:
    """An `IExecutionContext` that runs the bundle's graph."""

    def __init__(self, engine: "HostEngine") -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.activations = 0
        self.profile = -1

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        assert size_bytes == 2000  # the larger profile's
        self.activations = address

    def set_optimization_profile_async(self, profile: int, _stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, _stream: int) -> bool:
        return self.engine.is_capturable

    def execute_async_v3(self, _stream: int) -> bool:
        assert self.activations
        rows, tokens = self.shapes["input_ids"]
        positions = self.shapes["logits_index"][1]
        assert self.profile == (1 if tokens == positions == 1 else 0)
        if HostDevice.is_capturing:
            return True
        self.engine.steps += 1
        binding = self.engine.graph.io_binding()
        for name, address in self.addresses.items():
            dtype = np.float16 if "." in name else np.int64
            shape = self.shapes.get(name.replace("present", "past_key_values"))
            if name in self.shapes:
                binding.bind_input(name, "cpu", 0, dtype, shape, address)
            elif name.startswith("present."):
                assert address == self.addresses[name.replace("present", "past_key_values")]
                binding.bind_output(name, "cpu", 0, dtype, shape, address)
        shape = rows, positions, self.engine.vocab_size
        binding.bind_output("logits", "cpu", 0, np.float32, shape, self.addresses["logits"])
        self.engine.graph.run_with_iobinding(binding)
        self._pick(view(self.addresses["logits"], np.float32, shape))
        return True

    def _pick(self, logits: npt.NDArray[np.float32]) -> None:
        token_ids = np.argsort(-logits, axis=-1, kind="stable")[..., :64]
        shape = token_ids.shape
        view(self.addresses["top_indices"], np.int64, shape)[:] = token_ids
        largest = np.take_along_axis(logits, token_ids, axis=-1)
        view(self.addresses["top_logits"], np.float32, shape)[:] = largest
        view(self.addresses["logits_sum"], np.float32, shape[:2])[:] = logits.sum(axis=-1)


class HostEngine:
    """An `ICudaEngine` that counts its contexts and steps."""

    def __init__(self, bundle: Bundle) -> None:
        providers = ["CPUExecutionProvider"]
        self.graph: Any = ort.InferenceSession(
            str(bundle.graph_path("prefill")), providers=providers
        )
        self.vocab_size = bundle.config.vocab_size
        self.is_capturable = True
        self.contexts = self.steps = 0

    def create_runtime_config(self) -> "HostEngine":
        return self

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy.name == "USER_MANAGED"

    def create_execution_context(self, _config: object) -> HostContext:
        self.contexts += 1
        return HostContext(self)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 1000 * (profile + 1)


def view(address: int, dtype: Any, shape: tuple[int, ...]) -> Any:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    block = (ctypes.c_ubyte * count).from_address(address)
    return np.frombuffer(block, dtype).reshape(shape)


@pytest.fixture
def host_engine(engine_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> HostEngine:
    """Return what takes the place of the deserialized plan in sessions made from now on."""
    engine = HostEngine(engine_bundle)
    monkeypatch.setattr(tensorrt_session, "require_gpu", lambda _flavour, _index: GPU)
    monkeypatch.setattr(tensorrt_session, "CudaDevice", HostDevice)
    monkeypatch.setattr(loaded_engine, "create_runtime", lambda *_: object())
    monkeypatch.setattr(loaded_engine, "load_plan", lambda *_: engine)
    monkeypatch.setattr(loaded_engine, "read_tensors", lambda *_: ())
    monkeypatch.setattr(loaded_engine, "check_tensors", lambda *_: None)
    return engine


@pytest.fixture
def session(host_engine: HostEngine, text_engine: Any) -> Iterator[TensorRTSession]:
    assert host_engine.contexts == 0
    with TensorRTSession(text_engine()) as session:
        yield session


@pytest.fixture(scope="module")
def oracle(engine_bundle: Bundle) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(engine_bundle, device=Device(kind="cpu"), threads=1)


def texts(session: Any, options: Any, **arguments: Any) -> list[list[int]]:
    cache = session.new_cache(len(PROMPTS), 90)
    asked = GenerationOptions(max_new_tokens=12, **options)
    batch = BatchGeneration(session, cache, PROMPTS, asked, **arguments)
    for _ in batch.steps():
        pass
    return [list(row.new_tokens) for row in batch.rows]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 5, "seed": 3},
    {"top_p": 0.9, "seed": 4},
    {"top_k": 90, "seed": 4},
    {"repetition_penalty": 1.3},
]


@pytest.mark.parametrize("is_capturable", [False, True])
def test_the_text_is_that_of_the_graph(
    is_capturable: bool, session: TensorRTSession, host_engine: HostEngine, oracle: Any
) -> None:
    host_engine.is_capturable = is_capturable
    for options in OPTIONS:
        for chunk in (4, 512):
            expected = texts(oracle, options, prefill_chunk=chunk)
            assert texts(session, options, prefill_chunk=chunk) == expected
    assert session.has_cuda_graph == is_capturable


def test_a_step_is_recorded_once_for_a_batch_size_and_cache(
    session: TensorRTSession, host_engine: HostEngine
) -> None:
    whole = session.new_cache(3, 64)
    pos = np.zeros(3, np.int64)
    for round_ in range(4):
        for rows in (1, 3, 2):
            ids, index = np.full((rows, 1), 5), np.zeros((rows, 1), np.int64)
            session.step(ids, pos[:rows] + round_, index, whole.rows(0, rows), num_candidates=1)
    assert (host_engine.contexts, host_engine.steps) == (3, 12)
    # Other rows are other memory: the same context, bound and recorded anew.
    ids, index = np.full((1, 1), 5), np.zeros((1, 1), np.int64)
    here = np.array(session.step(ids, pos[:1], index, whole.rows(0, 1)).logits)
    there = np.array(session.step(ids, pos[:1], index, whole.rows(2, 3)).logits)
    np.testing.assert_array_equal(here, there)
    assert host_engine.contexts == 3
    del whole
    session.new_cache(1, 64)
    assert not session.has_cuda_graph


def test_a_step_is_recorded_when_it_repeats_the_one_before(session: TensorRTSession) -> None:
    whole = session.new_cache(2, 64)
    ids, index, pos = np.full((1, 1), 5), np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
    for row in (0, 1):  # prompts whose last token comes alone
        session.step(ids, pos, index, whole.rows(row, row + 1))
        assert not session.has_cuda_graph
    session.step(ids, pos + 1, index, whole.rows(1, 2))
    assert session.has_cuda_graph


def test_all_logits_cross_only_where_they_are_asked_for(session: TensorRTSession) -> None:
    cache = session.new_cache(1, 64)
    arguments = np.array([[2, 9, 8]]), np.zeros(1, np.int64), np.array([[2]]), cache
    for wanted, count in ((1, 64), (64, 64), (65, 512), (None, 512)):
        found = session.step(*arguments, num_candidates=wanted)
        assert found.logits.shape == (1, 1, count)
        assert (found.token_ids is None) == (count == 512)


def test_the_caches_length_is_the_engines_and_its_end_the_callers(session: TensorRTSession) -> None:
    cache = session.new_cache(2, 10)
    assert {tensor.shape[2] for tensor in cache.tensors} == {96}
    assert cache.max_seq_len == 10
    ids, index = np.ones((1, 4), np.int64), np.zeros((1, 1), np.int64)
    session.step(ids, np.array([6]), index, cache.rows(1, 2))
    with pytest.raises(SessionError, match="4 tokens at position 7 do not fit a KV cache of 10"):
        session.step(ids, np.array([7]), index, cache.rows(1, 2))
    with pytest.raises(SessionError, match="a step of 1 rows with a KV cache of 2"):
        session.step(ids, np.array([0]), index, cache)


@pytest.mark.parametrize(
    ("rows", "tokens", "positions", "message"),
    [
        (5, 1, 1, r"a step of 5 rows .* at most 4: .*--max-batch"),
        (1, 97, 1, r"a step of 97 tokens of a row .* at most 96: .*--prefill-chunk"),
        (1, 2, 2, r"a step of 2 logits of a row .* at most 1: .*--max-logits"),
    ],
)
def test_what_the_engine_was_not_built_for_is_refused_before_it_runs(
    rows: int,
    tokens: int,
    positions: int,
    message: str,
    session: TensorRTSession,
    host_engine: HostEngine,
) -> None:
    cache = session.new_cache(1, 96)
    index = np.zeros((rows, positions), np.int64)
    with pytest.raises(RequestError, match=message):
        session.step(np.ones((rows, tokens), np.int64), np.zeros(rows, np.int64), index, cache)
    assert host_engine.steps == 0


def test_caches_beyond_the_engine_are_refused(session: TensorRTSession) -> None:
    with pytest.raises(RequestError, match=r"a KV cache of 97 tokens .* at most 96"):
        session.new_cache(1, 97)
    with pytest.raises(RequestError, match=r"a KV cache of 5 rows .* at most 4"):
        session.new_cache(5, 96)
    ids = np.ones((1, 1), np.int64)
    with pytest.raises(SessionError, match="cache is a object; expected one from this session"):
        session.step(ids, np.zeros(1, np.int64), ids * 0, object())  # type: ignore[arg-type]  # on purpose


def test_a_step_that_fails_has_the_librarys_words(
    session: TensorRTSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = load_library("tensorrt-rtx").log

    def fail(_context: object, _stream: int) -> bool:
        log.add("ERROR", "an illegal memory access was encountered")
        return False

    monkeypatch.setattr(HostContext, "execute_async_v3", fail)
    cache = session.new_cache(1, 8)
    one = np.ones((1, 1), np.int64)
    with pytest.raises(SessionError, match="failed to run a step: an illegal memory access was"):
        session.step(one, np.zeros(1, np.int64), one * 0, cache)
    assert not log.take_errors()


def test_a_device_that_failed_can_still_be_let_go_of(
    session: TensorRTSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts(session, {})
    device: Any = session._cuda

    def fail(_device: object) -> None:
        raise SessionError("CUDA failed on cuda:0 in cuCtxSetCurrent")

    monkeypatch.setattr(HostDevice, "activate", fail)
    session.close()
    gc.collect()
    assert len(device.alive) == 0


def test_a_session_is_closed_when_its_last_step_is_over(
    session: TensorRTSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(HostDevice, "synchronize", lambda _: calls.append("waits"))
    monkeypatch.setattr(HostMemory, "free", lambda _: calls.append("frees"))
    session.close()
    assert calls == ["waits", *["frees"] * 4]


def test_steps_that_cannot_be_recorded_are_queued(
    session: TensorRTSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_device: object, _stream: object, _work: object) -> None:
        raise SessionError("CUDA cannot capture the step")

    monkeypatch.setattr(HostDevice, "capture", fail)
    expected = texts(session, {})
    assert texts(session, {}) == expected
    assert not session.has_cuda_graph
    said = "decode steps run without a CUDA graph: CUDA cannot capture the step"
    assert said in caplog.messages


@pytest.mark.usefixtures("host_engine")
def test_too_little_memory_says_what_to_do(
    text_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_device: object, size_bytes: int) -> HostMemory:
        raise MemoryError(f"no room for {size_bytes} bytes")

    session = TensorRTSession(text_engine())
    monkeypatch.setattr(HostDevice, "allocate", refuse)
    with pytest.raises(SessionError, match=r"KV cache of 1 rows of 96 tokens: .* --max-seq-len"):
        session.new_cache(1, 96)
    with pytest.raises(SessionError, match=r"too little free memory .* --max-batch"):
        TensorRTSession(text_engine())


@pytest.mark.usefixtures("host_engine")
@pytest.mark.parametrize("is_closed", [True, False])
def test_nothing_is_left_of_a_session(is_closed: bool, text_engine: Any) -> None:
    session = TensorRTSession(text_engine())
    device: Any = session._cuda
    texts(session, {"top_p": 0.9, "seed": 1})
    assert len(device.alive) >= 6
    if is_closed:
        session.close()
        session.close()
        with pytest.raises(SessionError, match="the session is closed"):
            session.new_cache(1, 8)
    del session
    gc.collect()
    assert len(device.alive) == 0


def test_batches_of_several_caches_may_run_in_turn(session: TensorRTSession) -> None:
    alone = texts(session, {})
    asked = GenerationOptions(max_new_tokens=12)
    caches = [session.new_cache(len(PROMPTS), 90) for _ in range(2)]
    batches = [BatchGeneration(session, cache, PROMPTS, asked) for cache in caches]
    for _ in zip(*(batch.steps() for batch in batches), strict=True):
        pass
    for batch in batches:
        assert [list(row.new_tokens) for row in batch.rows] == alone

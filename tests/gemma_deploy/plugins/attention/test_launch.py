# ruff: noqa: N802  # the fake has the names of CUDA's functions
import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma_deploy.cuda_driver import cuda_device_count
from gemma_deploy.errors import BackendUnavailableError, EngineError, SessionError
from gemma_deploy.plugins.attention import launch
from gemma_deploy.plugins.attention.cubins import KERNEL_NAMES, CompiledKernel, KernelArchive
from gemma_deploy.plugins.attention.schedule import CallShape, KernelShape

pytest.importorskip("cuda.bindings")

SHAPE = KernelShape(head_dim=256, group=8, dtype="float16", has_softcap=False)
SCALARS = launch.Scalars(scale=0.0625, softcap=0.0, sliding_window=512)
TENSORS = launch.Tensors(
    query=0x1000, key_cache=0x2000, value_cache=0x3000, input_pos=0x4000, output=0x5000, scratch=0x6000
)  # fmt: skip
SUCCESS, FAILURE = 0, 701


class FakeDriver:
    """Answers like `cuda.bindings.driver` on a GPU of compute capability 8.9, and keeps launches."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="multiprocessors",
    )
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="max shared"
    )

    def __init__(self) -> None:
        self.context = 77
        self.launches: list[tuple[Any, ...]] = []
        self.attributes: list[tuple[Any, ...]] = []
        self.launch_status = SUCCESS

    def cuCtxGetCurrent(self) -> Any:
        return SUCCESS, self.context

    def cuCtxGetDevice(self) -> Any:
        return SUCCESS, 0

    def cuDeviceGetAttribute(self, name: str, _device: int) -> Any:
        return SUCCESS, {"major": 8, "minor": 9, "multiprocessors": 20}[name]

    def cuModuleLoadData(self, cubin: bytes) -> Any:
        return SUCCESS, cubin

    def cuModuleGetFunction(self, module: bytes, symbol: bytes) -> Any:
        return SUCCESS, (module, symbol)

    def cuFuncSetAttribute(self, *arguments: Any) -> Any:
        self.attributes.append(arguments)
        return (SUCCESS,)

    def cuLaunchKernel(self, *arguments: Any) -> Any:
        self.launches.append(arguments)
        return (self.launch_status,)

    def cuGetErrorName(self, _error: int) -> Any:
        return SUCCESS, b"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"

    def cuGetErrorString(self, _error: int) -> Any:
        return SUCCESS, b"too many resources requested for launch"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    driver = FakeDriver()
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    launch._load_into.cache_clear()
    yield driver
    launch._load_into.cache_clear()


def archive(capability: int = 89) -> KernelArchive:
    return KernelArchive(
        shape=SHAPE,
        kernels=tuple(
            CompiledKernel(
                name=name,
                capability=capability,
                symbol=f"{name}_symbol",
                num_warps=8 if name == "wide" else 4,
                shared_bytes=60_000 if name == "wide" else 1_000,
                block_m=0 if name == "combine" else 64,
                cubin=name.encode(),
            )
            for name in KERNEL_NAMES
        ),
    )


def call(*, batch: int = 1, num_tokens: int = 1) -> CallShape:
    return CallShape(batch=batch, num_tokens=num_tokens, num_kv_heads=1, capacity=4096)


def test_decode_is_split_and_combined(driver: FakeDriver) -> None:
    kernels = launch.load_kernels(archive())
    kernels.run(call(), TENSORS, SCALARS, stream=9)
    attend, combine = driver.launches
    num_parts = kernels.plan(call(), SCALARS.sliding_window).num_parts
    assert num_parts > 1
    function, *grid_and_block, shared_bytes, stream, (values, kinds), extra = attend
    assert function == (b"narrow", b"narrow_symbol")
    assert grid_and_block == [1, num_parts, 1, 128, 1, 1]
    assert (shared_bytes, stream, extra) == (1_000, 9, 0)
    partial_lse = 0x6000 + num_parts * 8 * 256 * 4
    assert values == (
        *(0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, partial_lse),
        *(0.0625, 0.0, 512, 1, 4096, 1),
        *(0, 0),
    )
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    assert kinds == (*[pointer] * 7, *[ctypes.c_float] * 2, *[number] * 4, pointer, pointer)
    function, *grid_and_block, _, _, (values, kinds), _ = combine
    assert function == (b"combine", b"combine_symbol")
    assert grid_and_block == [8, 4, 1, 128, 1, 1]
    assert values == (0x6000, partial_lse, 0x5000, 1, 1, num_parts, 0, 0)
    assert kinds == (*[pointer] * 3, *[number] * 3, pointer, pointer)


@pytest.mark.skipif(cuda_device_count() > 0, reason="launches what is no kernel")
def test_the_bindings_take_the_arguments(driver: FakeDriver) -> None:
    from cuda.bindings import driver as real_driver

    launch.load_kernels(archive()).run(call(), TENSORS, SCALARS, stream=9)
    assert len(driver.launches) == 2
    for _, *arguments in driver.launches:
        # Arguments are packed before the driver is looked for; a TypeError would be their refusal.
        with pytest.raises(RuntimeError):
            real_driver.cuLaunchKernel(real_driver.CUfunction(), *arguments)


def test_prefill_that_fills_the_device_is_one_launch(driver: FakeDriver) -> None:
    kernels = launch.load_kernels(archive())
    kernels.run(call(batch=4, num_tokens=512), TENSORS, SCALARS, stream=0)
    ((function, *grid_and_block, shared_bytes, _, _, _),) = driver.launches
    assert function == (b"wide", b"wide_symbol")
    assert grid_and_block == [512 * 8 // 64, 1, 4, 256, 1, 1]
    assert shared_bytes == 60_000
    # Only kernels that need more than 48 KB of shared memory have to ask for it.
    assert driver.attributes == [((b"wide", b"wide_symbol"), "max shared", 60_000)]


def test_kernels_are_loaded_once_per_context(driver: FakeDriver) -> None:
    first = launch.load_kernels(archive())
    assert launch.load_kernels(archive()) is first
    driver.context = 78
    assert launch.load_kernels(archive()) is not first


def test_says_that_the_engine_is_for_other_gpus(driver: FakeDriver) -> None:
    assert driver.context
    with pytest.raises(EngineError, match=r"compute capability 9\.0; this GPU is 8\.9"):
        launch.load_kernels(archive(90))


def test_needs_a_context(driver: FakeDriver) -> None:
    driver.context = 0
    with pytest.raises(SessionError, match="CUDA context, and none is current"):
        launch.load_kernels(archive())


def test_a_failed_launch_carries_cudas_words(driver: FakeDriver) -> None:
    driver.launch_status = FAILURE
    with pytest.raises(
        SessionError,
        match=r"kernel narrow with grid \(1, .* failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES \(too many",
    ):
        launch.load_kernels(archive()).run(call(), TENSORS, SCALARS, stream=0)


def test_refuses_memory_that_is_not_aligned(driver: FakeDriver) -> None:
    tensors = launch.Tensors(
        query=0x1000, key_cache=0x2008, value_cache=0, input_pos=0, output=0, scratch=0
    )
    with pytest.raises(SessionError, match="aligned to 16 bytes; key_cache is at 0x2008"):
        launch.load_kernels(archive()).run(call(), tensors, SCALARS, stream=0)
    assert not driver.launches


@pytest.mark.skipif(cuda_device_count() > 0, reason="shows what happens without a GPU")
def test_needs_a_gpu() -> None:
    launch._driver.cache_clear()
    with pytest.raises(BackendUnavailableError, match="CUDA driver"):
        launch.load_kernels(archive())


def run_cubins(problem: Any, scratch: torch.Tensor, output: torch.Tensor) -> None:
    """Compile for this GPU, and launch as the plugin does, on torch's current stream."""
    from gemma_deploy.plugins.attention.compile import compile_archive

    batch, num_tokens, num_heads, head_dim = problem.query.shape
    num_kv_heads, capacity = problem.key_cache.shape[1:3]
    scale, softcap, sliding_window = problem.attributes
    shape = KernelShape(
        head_dim=head_dim,
        group=num_heads // num_kv_heads,
        dtype="float16" if problem.query.dtype == torch.float16 else "bfloat16",
        has_softcap=softcap > 0,
    )
    major, minor = torch.cuda.get_device_capability()
    kernels = launch.load_kernels(compile_archive(shape, (major * 10 + minor,)))
    call = CallShape(
        batch=batch, num_tokens=num_tokens, num_kv_heads=num_kv_heads, capacity=capacity
    )
    assert kernels.plan(call, sliding_window).scratch_bytes <= scratch.nbytes
    tensors = launch.Tensors(
        query=problem.query.data_ptr(),
        key_cache=problem.key_cache.data_ptr(),
        value_cache=problem.value_cache.data_ptr(),
        input_pos=problem.input_pos.data_ptr(),
        output=output.data_ptr(),
        scratch=scratch.data_ptr(),
    )
    scalars = launch.Scalars(scale=scale, softcap=softcap, sliding_window=sliding_window)
    kernels.run(call, tensors, scalars, torch.cuda.current_stream().cuda_stream)


def on_gpu(problem: Any) -> Any:
    tensors = {name: value.cuda() for name, value in vars(problem).items() if name != "attributes"}
    tensors["input_pos"] = tensors["input_pos"].int()
    return SimpleNamespace(**tensors, attributes=problem.attributes)


def scratch_on_gpu() -> torch.Tensor:
    # NaN bytes: parts that were not written must not be read.
    return torch.full((64 << 20,), 0xFF, dtype=torch.uint8, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "sliding_window"), [(0.0, 0), (2.0, 0), (0.0, 100)])
@pytest.mark.parametrize(
    ("input_pos", "num_tokens"),
    [((0, 127, 500, 899), 1), ((0,), 300), ((700, 3), 70), ((10,), 4)],
)
def test_cubins_equal_the_definition(
    make_problem: Callable[..., Any],
    input_pos: tuple[int, ...],
    num_tokens: int,
    softcap: float,
    sliding_window: int,
    dtype: torch.dtype,
) -> None:
    problem = make_problem(
        heads=(8, 1),
        head_dim=256,
        input_pos=input_pos,
        num_tokens=num_tokens,
        capacity=1024,
        softcap=softcap,
        sliding_window=sliding_window,
        dtype=dtype,
    )
    output = torch.full_like(problem.query, torch.nan, device="cuda")
    run_cubins(on_gpu(problem), scratch_on_gpu(), output)
    torch.cuda.synchronize()
    # A few roundings of the dtype: of the weights, and of the output.
    atol = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(output.cpu().double(), problem.expected, atol=atol, rtol=0)


@pytest.mark.gpu
def test_a_captured_graph_follows_input_pos(make_problem: Callable[..., Any]) -> None:
    def problem_at(position: int) -> Any:
        return on_gpu(
            make_problem(
                heads=(8, 1), head_dim=256, input_pos=(position,), num_tokens=1, capacity=4096
            )
        )

    problem, scratch = problem_at(0), scratch_on_gpu()
    output = torch.empty_like(problem.query)
    run_cubins(problem, scratch, output)  # loads the kernels, which capture would not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_cubins(problem, scratch, output)
    for position in (0, 1, 63, 64, 1000, 4095):
        now = problem_at(position)
        for name in ("query", "key_cache", "value_cache", "input_pos"):
            getattr(problem, name).copy_(getattr(now, name))
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(output.double(), now.expected, atol=4e-3, rtol=0)

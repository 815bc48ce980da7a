"""Engines of tiny models, really built with TensorRT for RTX, in its child process, without a GPU."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from gemma_deploy.bundle import Bundle
from gemma_deploy.engine import EngineFolder
from gemma_deploy.exporters.engine import BuildOptions, build_engine


class EngineBundles(Protocol):
    """Gives a bundle that engines may be built in, the same one for the same arguments."""

    def __call__(self, name: str, dtype: str = "float16") -> Bundle: ...


class Options(Protocol):
    """Options for RTX; what is not given is small."""

    def __call__(self, **options: Any) -> BuildOptions: ...


class Engines(Protocol):
    """Builds an engine on first use; options are those of `BuildOptions`."""

    def __call__(self, name: str, dtype: str = "float16", **options: Any) -> EngineFolder: ...


@pytest.fixture(scope="session")
def engine_bundle(
    tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> EngineBundles:
    """Return `engine_bundle(name, dtype="float16") -> Bundle`: a copy of the tiny bundle."""
    bundles: dict[tuple[str, str], Bundle] = {}

    def get(name: str, dtype: str = "float16") -> Bundle:
        if (name, dtype) not in bundles:
            folder = tmp_path_factory.mktemp(f"engine-{name}-{dtype}") / "bundle"
            bundles[name, dtype] = Bundle.open(shutil.copytree(tiny_bundle(name, dtype), folder))
        return bundles[name, dtype]

    return get


@pytest.fixture(scope="session")
def rtx_options() -> Options:
    """Return `rtx_options(**options) -> BuildOptions`: for 8.9, of 64 tokens, if nothing is said."""

    def get(**options: Any) -> BuildOptions:
        given = {"compute_capabilities": ("8.9",), "max_seq_len": 64, **options}
        return BuildOptions(flavour="tensorrt-rtx", **given)

    return get


@pytest.fixture(scope="session")
def engine(engine_bundle: EngineBundles, rtx_options: Options) -> Engines:
    """Return `engine(name, dtype="float16", **options) -> EngineFolder`."""

    def get(name: str, dtype: str = "float16", **options: Any) -> EngineFolder:
        return build_engine(engine_bundle(name, dtype), rtx_options(**options)).engine

    return get


@pytest.fixture(scope="session")
def tensorrt_over_rtx(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which `import tensorrt` gives its bindings over RTX's libraries.

    It shows that calls fit TensorRT's Python API; it says nothing of what TensorRT itself would do.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for an empty libnvinfer_plugin")
    found = [importlib.util.find_spec(name) for name in ("tensorrt_rtx_libs", "tensorrt_bindings")]
    if found[0] is None or found[0].origin is None or found[1] is None:
        pytest.skip("needs the libraries of tensorrt-rtx and the bindings of tensorrt")
    libraries, folder = Path(found[0].origin).parent, tmp_path_factory.mktemp("tensorrt")
    for link, library in (
        ("libnvinfer.so.11", "libtensorrt_rtx.so.1"),
        ("libnvonnxparser.so.11", "libtensorrt_onnxparser_rtx.so.1"),
        ("libtensorrt_rtx.so", "libtensorrt_rtx.so.1"),
    ):
        (folder / link).symlink_to(libraries / library)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", folder / "libnvinfer_plugin.so.11"],
        input=b"int initLibNvInferPlugins(void *logger, const char *space) { return 1; }",
        check=True,
    )
    (folder / "tensorrt.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    return {
        **os.environ,
        "LD_LIBRARY_PATH": f"{folder}:{libraries}",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }

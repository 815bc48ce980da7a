"""The code path of TensorRT itself, through its real bindings over the libraries of RTX."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from gemma_deploy.engine import EngineFolder

if TYPE_CHECKING:
    from tests.exporters.engine.conftest import EngineBundles

BUILD = """
import json, sys
from pathlib import Path
from gemma_deploy.bundle import Bundle
from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.exporters.engine import BuildOptions, build, build_engine

gpu = Gpu(name="GPU", compute_capability=(8, 9), memory_bytes=1 << 34)
build.read_driver = lambda: ("13.0", (gpu,))
options = BuildOptions(flavour="tensorrt", max_seq_len=64, **json.loads(sys.argv[2]))
print(build_engine(Bundle.open(Path(sys.argv[1])), options).engine.folder)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("gemma1", "float16", {"attention": "native"}),
        ("gemma2", "bfloat16", {}),
    ],
)
def test_an_engine_is_built(
    name: str,
    dtype: str,
    options: dict[str, object],
    engine_bundle: EngineBundles,
    tensorrt_over_rtx: dict[str, str],
) -> None:
    folder = engine_bundle(name, dtype).folder
    command = [sys.executable, "-c", BUILD, str(folder), json.dumps(options)]
    result = _run(command, tensorrt_over_rtx)
    for _ in range(2):
        # These bindings were not made for these libraries, whose builder now and then gives up
        # without a word. Any word would be ours to mind.
        if "(it gave no reason)" in result.stderr:
            result = _run(command, tensorrt_over_rtx)
    assert result.returncode == 0, result.stderr
    (built,) = [x for x in (folder / "engines").iterdir() if x.name.startswith("tensorrt-11.")]
    engine = EngineFolder.open(built)
    assert engine.manifest.build.flavour == "tensorrt"
    assert engine.manifest.build.targets == ("8.9",)
    assert (engine.manifest.build.plugin_version is not None) == (name == "gemma2")
    assert engine.changed_files() == []


def _run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, check=False, capture_output=True, text=True)

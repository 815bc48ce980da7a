from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gemma_deploy.exporters.engine.build import plan_build
from gemma_deploy.tensorrt import load_library

if TYPE_CHECKING:
    from tests.exporters.engine.conftest import EngineBundles, Options

TIMEOUT_S = 60


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "gemma_deploy.exporters.engine.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    yield process
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()


@pytest.fixture
def request_line(engine_bundle: EngineBundles, rtx_options: Options, tmp_path: Path) -> bytes:
    bundle = engine_bundle("gemma1")
    build = plan_build(
        bundle, rtx_options(attention="native"), load_library("tensorrt-rtx"), gpus=[]
    )
    request = {
        "bundle": str(bundle.folder),
        "build": build.to_dict(),
        "phase": "prefill",
        "plan": str(tmp_path / "engine.plan"),
    }
    return json.dumps(request).encode() + b"\n"


def _messages(child: subprocess.Popen[bytes]) -> Iterator[Any]:
    assert child.stdout is not None
    return map(json.loads, child.stdout)


def _send(child: subprocess.Popen[bytes], line: bytes) -> None:
    assert child.stdin is not None
    child.stdin.write(line)
    child.stdin.flush()


def test_ctrl_c_is_left_to_the_parent(
    child: subprocess.Popen[bytes], request_line: bytes, tmp_path: Path
) -> None:
    _send(child, request_line)
    messages = _messages(child)
    assert next(messages)["kind"] == "progress"
    child.send_signal(signal.SIGINT)
    *_, last = messages
    assert last["kind"] == "done"
    assert last["size_bytes"] == (tmp_path / "engine.plan").stat().st_size
    assert child.wait(TIMEOUT_S) == 0


def test_running_it_warns_of_nothing() -> None:
    # Python warns when a module is run that its package has imported already.
    script = "import gemma_deploy.exporters.engine, sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert "gemma_deploy.exporters.engine.process" in result.stdout.split()
    assert "gemma_deploy.exporters.engine.child" not in result.stdout.split()


def test_it_ends_when_its_parent_is_gone(
    child: subprocess.Popen[bytes], request_line: bytes
) -> None:
    _send(child, request_line)
    assert next(_messages(child))["stage"] == "preparing the graph"
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(TIMEOUT_S) == 1


def test_a_full_disk_keeps_its_number(child: subprocess.Popen[bytes], request_line: bytes) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    request = json.loads(request_line) | {"plan": "/dev/full"}
    _send(child, json.dumps(request).encode() + b"\n")
    *_, last = _messages(child)
    assert last == {
        "kind": "os_error",
        "errno": 28,
        "reason": os.strerror(28),
        "filename": "/dev/full",
    }

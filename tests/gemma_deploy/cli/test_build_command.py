import json
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from gemma_deploy.bundle import Bundle
from gemma_deploy.cuda_driver import cuda_device_count
from gemma_deploy.engine import EngineFolder
from gemma_deploy.engine_build import build_command
from gemma_deploy.exporters.engine import BuildOptions

SMALL = ("--max-seq-len", "64", "--compute-capability", "8.9")


@pytest.fixture(scope="module")
def half_bundle(
    tiny_bundle: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A float16 bundle; the test that builds leaves its engine to the next one."""
    folder = tmp_path_factory.mktemp("half") / "my bundle"
    return shutil.copytree(tiny_bundle("gemma1", "float16"), folder)


def test_build_then_find_then_pack(
    invoke: Callable[..., Result], half_bundle: Path, tmp_path: Path
) -> None:
    built = invoke("build", half_bundle, "--backend", "tensorrt-rtx", *SMALL)
    assert built.exit_code == 0, built.output
    first, second = built.stdout.splitlines()
    (folder,) = (half_bundle / "engines").iterdir()
    assert first.startswith(f"{folder}  ")
    assert first.endswith("MiB, for compute capability 8.9")
    then = {
        False: f"pack '{half_bundle}' --backend tensorrt-rtx --output ENGINE, for a machine with a GPU",
        True: f"generate '{half_bundle}' --backend tensorrt-rtx \"Once upon a time\"",
    }
    assert second == f"Next: gemma-deploy {then[cuda_device_count() > 0]}"
    stages = built.stderr.splitlines()
    assert stages[:3] == [
        "preparing the graph ...",
        "building the engine ...",
        "writing the plan ...",
    ]

    again = invoke("build", half_bundle, "--backend", "tensorrt-rtx", *SMALL, "--json")
    body = json.loads(again.stdout)
    assert body["path"] == str(folder)
    assert not body["is_new"]
    assert body["build"]["targets"] == ["8.9"]
    assert body["size_bytes"] == body["files"]["engine.plan"] > 0
    assert "was built before" in again.stderr

    packed = invoke(
        "pack", half_bundle, "--backend", "tensorrt-rtx", "--output", tmp_path / "out", "--json"
    )
    assert packed.exit_code == 0, packed.output
    body = json.loads(packed.stdout)
    assert body["path"] == str(tmp_path / "out")
    assert set(body["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {
        "engine.json"
    }
    assert set(body["files"]) == {"engine.plan", "generation_config.json"}
    assert EngineFolder.open(tmp_path / "out").changed_files() == []

    refused = invoke("pack", half_bundle, "--backend", "tensorrt-rtx", "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "use --force" in refused.stderr
    text = invoke(
        "pack", half_bundle, "--backend", "tensorrt-rtx", "-o", tmp_path / "out", "--force"
    )
    assert f"Next, on the device: gemma-deploy generate {tmp_path / 'out'} " in text.stdout

    verified = invoke("verify", tmp_path / "out")
    assert verified.exit_code == 0, verified.output
    assert "ok    hashes: SHA-256 of 2 files as the manifest says" in verified.stdout
    plan = tmp_path / "out" / "engine.plan"
    with plan.open("r+b") as file:
        file.seek(plan.stat().st_size // 2)
        file.write(b"damaged")
    damaged = invoke("verify", tmp_path / "out")
    assert damaged.exit_code == 1
    assert "FAIL  hashes: engine.plan changed since they were made" in damaged.stdout
    compared = invoke("verify", tmp_path / "out", "--graph", "tensorrt")
    assert compared.exit_code == 2
    assert "is an engine and holds no graphs" in compared.stderr


def test_every_option_reaches_the_builder(
    invoke: Callable[..., Result], half_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Bundle, BuildOptions, bool]] = []

    class Stop(Exception):  # noqa: N818 - ends the command where the work would begin
        pass

    def build_engine(bundle: Bundle, options: BuildOptions, *, force: bool, **_: Any) -> Any:
        asked.append((bundle, options, force))
        raise Stop

    monkeypatch.setattr("gemma_deploy.exporters.engine.build_engine", build_engine)
    options = BuildOptions(
        flavour="tensorrt-rtx",
        compute_capabilities=("8.6", "8.9"),
        max_batch_size=2,
        max_seq_len=100,
        max_step_tokens=30,
        max_logits=3,
        num_candidates=7,
        layout="two-engines",
        attention="plugin",
    )
    result = invoke(
        *("build", half_bundle, "--backend", "tensorrt-rtx", "--compute-capability", "8.6"),
        *("--compute-capability", "8.9", "--max-batch", 2, "--max-seq-len", 100),
        *("--prefill-chunk", 30, "--max-logits", 3, "--top-logits", 7),
        *("--layout", "two-engines", "--attention", "plugin", "--force"),
    )
    assert isinstance(result.exception, Stop)
    invoke("build", half_bundle, "--backend", "tensorrt")
    assert [x[1:] for x in asked] == [(options, True), (BuildOptions(flavour="tensorrt"), False)]


def test_the_command_an_engine_is_rebuilt_with_is_one(
    invoke: Callable[..., Result], half_bundle: Path
) -> None:
    """What other verbs advise is taken by this one: it finds the very same engine."""
    engines = [EngineFolder.open(path) for path in (half_bundle / "engines").iterdir()]
    for engine in engines:
        _, *arguments = shlex.split(build_command(half_bundle, engine.manifest.build))
        result = invoke(*arguments, "--json")
        assert json.loads(result.stdout)["path"] == str(engine.folder)
    assert engines


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["--max-seq-len", "513"],
            2,
            "max_seq_len is 513; expected a whole number from 1 to 512",
        ),
        (["--compute-capability", "9.0"], 2, "cannot build for compute capability 9.0"),
        (["--max-batch", "0"], 2, "Invalid value for '--max-batch'"),
        (["--layout", "three"], 2, "Invalid value for '--layout'"),
    ],
)
def test_requests_that_cannot_be(
    arguments: list[str],
    code: int,
    message: str,
    invoke: Callable[..., Result],
    half_bundle: Path,
) -> None:
    result = invoke("build", half_bundle, "--backend", "tensorrt-rtx", *arguments)
    assert result.exit_code == code
    assert message in result.stderr


def test_a_float32_bundle_is_refused(
    invoke: Callable[..., Result], tiny_bundle: Callable[[str, str], Path]
) -> None:
    result = invoke("build", tiny_bundle("gemma1", "float32"), "--backend", "tensorrt-rtx")
    assert result.exit_code == 1
    assert "TensorRT engines compute in float16 or bfloat16" in result.stderr


def test_pack_before_build(
    invoke: Callable[..., Result], half_bundle: Path, tmp_path: Path
) -> None:
    result = invoke("pack", half_bundle, "--backend", "tensorrt", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "--backend tensorrt`" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_both_processes_and_leaves_nothing(
    number: signal.Signals,
    start: Callable[..., Any],
    half_bundle: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(half_bundle, folder, ignore=shutil.ignore_patterns("engines"))
    process = start("build", folder, "--backend", "tensorrt-rtx", *SMALL)
    while b"building" not in (line := process.stderr.readline()):
        assert line, process.wait()
    (child,) = map(
        int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    )
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    deadline_s = time.monotonic() + 30
    while _is_alive(child) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not _is_alive(child)
    if number != signal.SIGKILL:
        assert not (folder / "engines").exists()
    else:
        # Nobody was left to clean up; nothing of it passes for an engine.
        assert all(path.name.startswith(".") for path in (folder / "engines").iterdir())


def _is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status

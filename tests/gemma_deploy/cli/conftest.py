"""Fixtures: the program run in this process, and in one of its own; an engine that is none."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gemma_deploy.cli.main import cli
from gemma_deploy.config import GemmaConfig
from gemma_deploy.engine import ENGINE_FILE, EngineManifest, Plan
from gemma_deploy.engine_build import EngineBuild, EngineLimits
from gemma_deploy.file_records import record_file


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Return `invoke(*arguments, input=None)`: runs the program here; stdout and stderr apart."""

    def run(*arguments: object, input: str | bytes | None = None) -> Result:  # noqa: A002 - as CliRunner
        return CliRunner().invoke(cli, [str(a) for a in arguments], input=input)

    return run


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., "subprocess.Popen[bytes]"]:
    """Return `start(*arguments, environment={}, **pipes)`: starts a process of the program."""

    def run(
        *arguments: object, environment: Mapping[str, str] | None = None, **pipes: Any
    ) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, "-m", "gemma_deploy", *(str(a) for a in arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            cwd=tmp_path,
            stdin=pipes.get("stdin", subprocess.DEVNULL),
            stdout=pipes.get("stdout", subprocess.PIPE),
            stderr=pipes.get("stderr", subprocess.PIPE),
        )

    return run


@pytest.fixture
def write_engine() -> Callable[[Path], Path]:
    """Return `write_engine(folder)`: writes an engine whose plan is no plan, for reading about it."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "engine.plan").write_bytes(b"plan" * 512)
        build = EngineBuild(
            flavour="tensorrt-rtx",
            library_version="1.7.1",
            targets=("8.0", "8.9"),
            layout="one-engine",
            attention="auto",
            plugin_version="1",
            limits=EngineLimits(
                max_batch_size=2,
                max_seq_len=100,
                max_step_tokens=30,
                max_logits=3,
                num_candidates=7,
            ),
            graphs={"prefill": "a", "decode": "b"},
            weights="c",
        )
        manifest = EngineManifest(
            model=GemmaConfig(num_hidden_layers=2, vocab_size=50),
            cache_dtype="bfloat16",
            build=build,
            plans={
                "prefill": Plan(path="engine.plan", profile=0),
                "decode": Plan(path="engine.plan", profile=1),
            },
            tokenizer=(),
            generation=None,
            model_max_seq_len=8192,
            files={"engine.plan": record_file(folder / "engine.plan")},
            versions={"python": "3.11"},
        )
        (folder / ENGINE_FILE).write_text(manifest.to_json())
        return folder

    return write

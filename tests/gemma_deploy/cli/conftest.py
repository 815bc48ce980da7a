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
from gemma_deploy.file_records import record_file
from gemma_deploy.runtime.benchmark.results import (
    OURS,
    BenchCase,
    BenchReport,
    Contender,
    Measurement,
    Roofline,
    RoundTimes,
)
from tests.engine_build import BUILD


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
def bench_report() -> BenchReport:
    """Ours and `slow`, a half as fast, over two lengths of prompts; `absent` did not run.

    Ours in two rounds: 1000 and 1250 tokens/s at prefill, 100 and 80 at decode.
    """
    cases = [BenchCase(prompt_tokens=x, new_tokens=3, batch_size=2) for x in (8, 256)]
    measurements = [
        Measurement(
            contender=name,
            case=case,
            rounds=tuple(
                RoundTimes(
                    ttft_s=factor * case.prompt_tokens * 2 / prefill,
                    step_s=(factor * 2 / decode, factor * 2 / decode),
                )
                for prefill, decode in ((1000, 100), (1250, 80))
            ),
        )
        for case in cases
        for name, factor in ((OURS, 1), ("slow", 2))
    ]
    return BenchReport(
        model="models/bundle",
        contenders=(
            Contender(
                name=OURS, description="onnxruntime, cpu", load_s=1.5, peak_memory_bytes=3 << 30
            ),
            Contender(
                name="slow", description="torch, cpu", load_s=0.25, peak_memory_bytes=1 << 20
            ),
            Contender(name="absent", skipped="needs 9 GiB"),
        ),
        measurements=tuple(measurements),
        # At 8 prompt tokens, 2 rows and 45 steps/s: 45 * (900 + 2 * 9.5 * 10) = 49,050 bytes/s.
        roofline=Roofline(
            read_bytes_per_s=98_100,
            matrix_flop_per_s=4_500_000,
            weights_bytes_per_step=900,
            cache_bytes_per_token=10,
            flop_per_token=1000,
        ),
        environment={"CPU": "Some CPU", "threads": "2", "date": "2026-11-23 04:00 UTC"},
    )


@pytest.fixture
def write_engine() -> Callable[[Path], Path]:
    """Return `write_engine(folder)`: writes an engine whose plan is no plan, for reading about it."""

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "engine.plan").write_bytes(b"plan" * 512)
        manifest = EngineManifest(
            model=GemmaConfig(num_hidden_layers=2, vocab_size=50),
            cache_dtype="bfloat16",
            build=BUILD,
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

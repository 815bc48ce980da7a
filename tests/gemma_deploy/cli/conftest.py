"""Fixtures: the program run in this process, and in one of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gemma_deploy.cli.main import cli


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

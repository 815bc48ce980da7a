"""A machine that only runs bundles: without torch and what graphs are written with."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# What exporting takes and running does not: modules, and what pip calls them.
MODULES = ("torch", "onnxscript", "onnx_ir", "transformers", "huggingface_hub")
DISTRIBUTIONS = {"torch", "onnxscript", "onnx-ir"}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run() -> Run:
    """Return `run(*arguments, input="")`: the program, in a process without these modules."""

    def start(
        *arguments: object,
        input: str = "",  # noqa: A002 - as subprocess
    ) -> "subprocess.CompletedProcess[str]":
        code = (
            f"import sys; sys.modules.update(dict.fromkeys({MODULES!r}))\n"
            "from gemma_deploy.cli.main import main; main()"
        )
        line = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, check=False, input=input)

    return start


class TestWorks:
    def test_generate(self, run: Run, bundle: Path) -> None:
        result = run("generate", bundle, "Some text", "--max-new-tokens", "3")

        assert result.returncode == 0, result.stderr
        assert result.stdout

    def test_chat(self, run: Run, bundle: Path) -> None:
        result = run("chat", bundle, "--max-new-tokens", "3", input="Hello\n")

        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize("verb", ["inspect", "verify", "doctor"])
    def test_about_a_bundle(self, verb: str, run: Run, bundle: Path) -> None:
        result = run(verb, bundle)

        assert result.returncode == 0, result.stderr
        assert "FAIL" not in result.stdout

    def test_bench(self, run: Run, bundle: Path) -> None:
        result = run("bench", bundle, "--prompt-tokens", 8, "--new-tokens", 2, "--rounds", 1)

        assert result.returncode == 0, result.stderr

    def test_cache(self, run: Run) -> None:
        assert run("cache", "list").returncode == 0

    def test_evaluate(self, run: Run, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("Some words of a text that is read. " * 5)

        result = run("evaluate", bundle, "--text", tmp_path / "text.txt")

        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["export", "CHECKPOINT", "-o", "OUT"], "onnx_ir|torch"),
        (["verify", "BUNDLE", "--checkpoint", "CHECKPOINT"], "torch"),
        (["generate", "CHECKPOINT", "Some text"], "torch"),
        (["build", "BUNDLE", "--backend", "tensorrt-rtx"], "onnx onnx-ir"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_needs_them_says_so(
    arguments: list[str],
    package: str,
    run: Run,
    bundle: Path,
    bundle_checkpoint: Path,
    tmp_path: Path,
) -> None:
    places = {"BUNDLE": bundle, "CHECKPOINT": bundle_checkpoint, "OUT": tmp_path / "out"}

    result = run(*(places.get(argument, argument) for argument in arguments))

    assert result.returncode == 1
    assert re.search(f"Error: .*pip install ({package})", result.stderr)
    assert "Traceback" not in result.stderr


def test_the_documented_install_line_is_complete() -> None:
    raw = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {re.split("[<>=;]", line)[0].strip() for line in raw["project"]["dependencies"]}
    page = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    line = re.search(r"^pip install (onnxruntime .*)$", page, re.MULTILINE)
    assert line is not None

    assert set(line[1].split()) == needed - DISTRIBUTIONS - {"onnxruntime-gpu"}

"""The samples run as a reader would run them, one after the other."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_sample(name: str, bundle: Path) -> str:
    command = [sys.executable, str(ROOT / "samples" / name), str(bundle)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "bundle"
    assert "prefill.onnx" in run_sample("01_export.py", folder)
    return folder


def test_generate_streams_and_batches(bundle: Path) -> None:
    output = run_sample("02_generate.py", bundle)
    assert output.startswith("The for statement is used to")
    assert "tokens/s" in output
    assert output.count(" -> ") == 3
    assert output == run_sample_without_timing(output, run_sample("02_generate.py", bundle))


def run_sample_without_timing(first: str, second: str) -> str:
    """Return the second output with the first's timing line: everything else must be the same."""
    timing = next(line for line in first.splitlines() if "tokens/s" in line)
    lines = [timing if "tokens/s" in line else line for line in second.splitlines()]
    return "\n".join(lines) + "\n"


def test_chat_answers_every_question(bundle: Path) -> None:
    output = run_sample("03_chat.py", bundle)
    assert output.count("user: ") == output.count("model: ") == 2


@pytest.mark.parametrize("name", ["02_generate.py", "03_chat.py"])
def test_without_a_bundle_it_is_said_what_to_run(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "samples" / name)]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "build/tiny-gemma-bundle does not exist" in done.stderr
    assert "is written by 01_export.py" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hub" not in done.stderr

"""The README's tour runs as it is written."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def block(language: str) -> str:
    """Return the README's only code block in a language."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    return str(text)


def test_the_tour(tmp_path: Path) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    program = f'gemma-deploy() {{ "{sys.executable}" -m gemma_deploy "$@"; }}\n'
    shell = ["bash", "-euc", program + block("bash")]
    output = subprocess.run(shell, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "parity, decode graph" in output
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 2

    python = [sys.executable, "-W", "error", "-c", block("python")]
    output = subprocess.run(python, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    # Sampled, so it may well end with empty lines.
    assert output.partition("Return a list of")[2].strip() != ""

"""A few changed files for every reader; `python -m tests.fuzz` tries as many as there is time for."""

from pathlib import Path

import pytest

from gemma_deploy.errors import RequestError
from tests.fuzz.driver import Input, run_inputs
from tests.fuzz.kinds import KINDS, build_fixtures, prepared

CORPUS = Path(__file__).parent / "corpus"
INPUTS_PER_KIND = 12


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    build_fixtures(folder)
    return folder


@pytest.mark.parametrize("name", sorted(KINDS))
def test_right_files_are_read(fixtures: Path, tmp_path: Path, name: str) -> None:
    folder = prepared(KINDS[name], fixtures, tmp_path, None)
    if name == "adapter-config":
        with pytest.raises(RequestError, match="is an adapter of google/gemma"):
            KINDS[name].read(folder)
    else:
        KINDS[name].read(folder)


def test_changed_files_are_read_or_refused(fixtures: Path) -> None:
    inputs = [Input(name, seed) for name in KINDS for seed in range(INPUTS_PER_KIND)]
    tally = run_inputs(inputs, fixtures)
    assert tally.findings == []
    assert tally.num_inputs == len(inputs)
    assert 0 < tally.num_refused < len(inputs)


def test_what_was_found_once(fixtures: Path) -> None:
    files = sorted(path for path in CORPUS.rglob("*") if path.is_file())
    tally = run_inputs([Input(path.parent.name, str(path)) for path in files], fixtures)
    assert tally.findings == []
    assert tally.num_inputs == len(files) > 0


def test_deaths_and_raw_errors_are_counted(
    fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken readers in place of ours: the driver must not call everything right."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from gemma_deploy.cli import prompts\n"
        "turns = iter(range(9))\n"
        "def broken(arguments, file):\n"
        "    turn = next(turns)\n"
        "    if turn == 1:\n"
        "        os.abort()\n"
        "    raise KeyError(turn)\n"
        "prompts.read_prompts = broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tally = run_inputs([Input("prompts-text", seed) for seed in range(4)], fixtures)
    assert [x.outcome for x in tally.findings] == ["raw", "dead", "raw", "dead"]
    assert tally.num_inputs == 4

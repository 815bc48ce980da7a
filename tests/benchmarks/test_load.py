"""The load benchmark runs whole loads in fresh processes, and summarizes them."""

from pathlib import Path

import pytest

from benchmarks.load import FIGURES, measure, rows, summary
from gemma_deploy.errors import SessionError
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.runtime.benchmark.results import Spread

TINY_GEMMA = Path(__file__).parents[2] / "samples" / "tiny-gemma"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("load") / "bundle"
    export_checkpoint(TINY_GEMMA, folder, graphs=["onnxruntime"])
    return folder


def test_a_turn(bundle: Path, tmp_path: Path) -> None:
    figures = measure(bundle, tmp_path / "cache", 1)
    assert figures.keys() == FIGURES.keys()
    assert 0 < figures["load_s"] < figures["first_token_s"]
    assert 0 < figures["private_mb"] < figures["peak_mb"]
    assert list((tmp_path / "cache").iterdir()), "packed weights are kept there"


def test_a_turn_that_fails(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="it holds nothing"):
        measure(tmp_path, None, 1)


def test_medians_and_ranges() -> None:
    turns = [dict.fromkeys(FIGURES, x) for x in (3.0, 1.0, 20.0)]
    found = {"mine": summary(turns)}
    assert found["mine"]["load_s"] == Spread(median=3.0, lowest=1.0, highest=20.0)
    assert rows(found) == [["bundle", *FIGURES.values()], ["mine", *["3.00 (1.00 to 20)"] * 5]]

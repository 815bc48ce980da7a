"""What the verbs say of a bundle that quantization moved far from its checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from gemma_deploy.bundle import Bundle
from gemma_deploy.cli.main import cli
from gemma_deploy.errors import BundleError

OPTIONS = "Closer are exports with --method gptq (leaves about a quarter of it), --embedding-bits 8"


@pytest.fixture(scope="module")
def exported(bundle_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What `export --int4 --method rtn` said of random weights, which lose most of what they say."""
    return export(
        bundle_checkpoint, tmp_path_factory.mktemp("far") / "bundle", "--int4", "--method", "rtn"
    )


@pytest.fixture(scope="module")
def far(exported: Result) -> Path:
    """Its bundle."""
    return Path(exported.stdout.partition("  ")[0])


@pytest.fixture(scope="module")
def near(bundle_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What `export --int8 --json` said."""
    folder = tmp_path_factory.mktemp("near") / "bundle"
    return export(bundle_checkpoint, folder, "--int8", "--json")


def export(checkpoint: Path, folder: Path, *options: str) -> Result:
    arguments = ["export", str(checkpoint), "-o", str(folder), "--graphs", "onnxruntime", *options]
    return CliRunner().invoke(cli, arguments)


class TestExport:
    def test_says_how_far_and_what_would_be_closer(self, exported: Result, far: Path) -> None:
        found = Bundle.open(far).manifest.divergence

        assert exported.exit_code == 0, exported.output
        assert found is not None
        assert found.mean_kl_nats > 0.05
        assert exported.stdout.splitlines()[1] == f"From the original: {found}"
        warning = f"Warning: a mean KL of {found.mean_kl_nats:.2g} nats is far from the original"
        assert warning in exported.stderr
        assert OPTIONS in exported.stderr

    def test_json_holds_the_figures(self, near: Result) -> None:
        report = json.loads(near.stdout)

        manifest = json.loads((Path(report["path"]) / "manifest.json").read_text())
        assert report["divergence"] == manifest["quantization"]["divergence"]
        assert 0 < report["divergence"]["mean_kl_nats"] < 0.05
        assert "Warning" not in near.stderr

    def test_without_calibration(
        self, invoke: Callable[..., Result], bundle_checkpoint: Path, tmp_path: Path
    ) -> None:
        options = ("--int8", "--no-calibration", "--graphs", "onnxruntime")

        result = invoke("export", bundle_checkpoint, "-o", tmp_path / "out", *options)

        assert Bundle.open(tmp_path / "out").manifest.divergence is None
        assert "was not measured: --no-calibration was given." in result.stderr
        assert "From the original" not in result.stdout
        inspected = " ".join(invoke("inspect", tmp_path / "out").stdout.split())
        assert "from the original not measured" in inspected

    def test_without_a_tokenizer(
        self,
        invoke: Callable[..., Result],
        tiny_checkpoint: Callable[[str], Path],
        tmp_path: Path,
    ) -> None:
        options = ("--int8", "--graphs", "onnxruntime")

        result = invoke("export", tiny_checkpoint("gemma2"), "-o", tmp_path / "out", *options)

        assert result.exit_code == 0, result.output
        assert Bundle.open(tmp_path / "out").manifest.divergence is None
        assert "was not measured: there is no tokenizer to read a text with." in result.stderr

    def test_a_text_that_is_too_short_to_measure_on(
        self, bundle_checkpoint: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "short").write_text("Work")
        options = ("--int8", "--calibration-text", str(tmp_path / "short"))

        result = export(bundle_checkpoint, tmp_path / "out", *options)

        assert result.exit_code == 0, result.output
        assert "was not measured: the calibration text is too short." in result.stderr

    def test_of_a_text_that_is_too_short_nothing_is_written(
        self, invoke: Callable[..., Result], bundle_checkpoint: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "short").write_text("Work")
        options = ("--int8", "--calibration-text", tmp_path / "short")

        result = invoke("export", bundle_checkpoint, "-o", tmp_path / "out", *options)

        assert result.exit_code == 2
        assert "the calibration text has" in result.stderr
        assert "at least 64 are needed: give a longer text" in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["short"]


def test_inspect_shows_it(invoke: Callable[..., Result], far: Path) -> None:
    found = Bundle.open(far).manifest.divergence

    shown = " ".join(invoke("inspect", far).stdout.split())

    assert f"from the original {found}" in shown


class TestVerify:
    def test_a_distance_past_the_limit_is_a_warning(
        self, invoke: Callable[..., Result], far: Path, bundle_checkpoint: Path
    ) -> None:
        result = invoke("verify", far, "--checkpoint", bundle_checkpoint, "--tokens", 40)

        *_, figures, advice = result.stdout.splitlines()

        assert result.exit_code == 0, result.output
        assert figures.startswith("warn  distance, from the checkpoint: KL ")
        assert advice.startswith("      a mean KL of ")
        assert OPTIONS in advice
        assert result.stdout.count("warn  ") == 1

    def test_json_holds_it(
        self, invoke: Callable[..., Result], far: Path, bundle_checkpoint: Path
    ) -> None:
        options = ("--checkpoint", bundle_checkpoint, "--tokens", 40, "--max-kl", 1e-3, "--json")

        report = json.loads(invoke("verify", far, *options).stdout)

        *others, distance = report["checks"]
        # Past a bound of one's own it is a failure, and the advice the same.
        assert not report["ok"]
        assert not distance["is_ok"]
        assert distance["distance"]["mean_kl_nats"] > 0.1
        assert OPTIONS in distance["warning"]
        assert all(check["warning"] is None for check in others)

    def test_a_bundle_that_is_near_is_ok(
        self, invoke: Callable[..., Result], near: Result, bundle_checkpoint: Path
    ) -> None:
        folder = json.loads(near.stdout)["path"]

        result = invoke("verify", folder, "--checkpoint", bundle_checkpoint, "--tokens", 40)

        assert result.stdout.splitlines()[-1].startswith("ok    distance, from the checkpoint: KL ")


def test_evaluate_says_it_in_a_line(
    invoke: Callable[..., Result], far: Path, bundle_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("You may reproduce and distribute copies of the Work. " * 3)
    options = ("--text", tmp_path / "text", "--reference", bundle_checkpoint)

    table, parsed = invoke("evaluate", far, *options), invoke("evaluate", far, *options, "--json")
    alone = invoke("evaluate", far, *options[:2])

    assert "Warning: a mean KL of " in table.stderr
    assert OPTIONS in table.stderr
    assert OPTIONS in json.loads(parsed.stdout)["warning"]
    assert "Warning" not in alone.stderr


def test_a_bundle_made_before_it_was_measured(far: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(far, tmp_path / "old"))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["quantization"]["divergence"]
    (folder / "manifest.json").write_text(json.dumps(manifest))

    assert Bundle.open(folder).manifest.divergence is None


@pytest.mark.parametrize(
    "value",
    [
        5,
        [],
        {"mean_kl_nats": 0.1, "same_top1": 0.9},
        {"mean_kl_nats": float("inf"), "same_top1": 0.9, "num_tokens": 3},
        {"mean_kl_nats": 0.1, "same_top1": 2, "num_tokens": 3},
    ],
)
def test_a_manifest_with_figures_that_cannot_be(far: Path, tmp_path: Path, value: object) -> None:
    folder = Path(shutil.copytree(far, tmp_path / "damaged"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["quantization"]["divergence"] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
        Bundle.open(folder)

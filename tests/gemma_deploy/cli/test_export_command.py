import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import Result

from gemma_deploy.bundle import Bundle

if TYPE_CHECKING:
    from tests.gemma_deploy.conftest import HubServer


class TestExport:
    def test_says_which_folders_it_makes(
        self,
        invoke: Callable[..., Result],
        bundle_checkpoint: Path,
        bundle: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("gemma_deploy.api.export", recorder({}, bundle))

        result = invoke("export", bundle_checkpoint, "-o", tmp_path / "no" / "parent" / "x")

        parent = tmp_path / "no" / "parent"
        assert f"Note: the folder {parent} does not exist and will be made" in result.stderr

    @pytest.mark.parametrize(
        ("options", "dtype"),
        [
            ([], None),
            (["--fp32"], "float32"),
            (["--fp16"], "float16"),
            (["--bf16"], "bfloat16"),
            (["--dtype", "bfloat16"], "bfloat16"),
            (["--dtype", "float16", "--fp16"], "float16"),
        ],
    )
    def test_prints_the_bundle_and_what_to_do_next(
        self,
        options: list[str],
        dtype: str | None,
        invoke: Callable[..., Result],
        bundle_checkpoint: Path,
        bundle: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        asked: dict[str, object] = {}
        monkeypatch.setattr("gemma_deploy.api.export", recorder(asked, bundle))

        result = invoke("export", bundle_checkpoint, "--output", tmp_path / "out", *options)

        assert result.exit_code == 0
        assert asked == {
            "checkpoint": bundle_checkpoint,
            "output": tmp_path / "out",
            "dtype": dtype,
            "cache_dtype": None,
            "graphs": None,
            "quantization": None,
            "calibration_text": None,
            "is_calibrated": True,
            "force": False,
        }
        first, second = result.stdout.splitlines()
        assert first.startswith(f"{tmp_path / 'my bundle'}  ")
        assert second == (
            f"Next: gemma-deploy generate '{tmp_path / 'my bundle'}' \"Once upon a time\""
        )
        assert first.endswith("weights in float32")
        assert result.stderr.startswith("writing weights ...\ntracing ...\nExported in ")

    def test_engines_that_go_with_the_old_bundle_are_counted(
        self,
        invoke: Callable[..., Result],
        bundle_checkpoint: Path,
        bundle: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("gemma_deploy.api.export", recorder({}, bundle))
        old = Path(shutil.copytree(bundle, tmp_path / "old"))
        for name in ("one", "two", ".three.partial-1-ab"):
            (old / "engines" / name).mkdir(parents=True)

        result = invoke("export", bundle_checkpoint, "--output", old, "--force")

        assert "The 2 engine(s) of the old bundle went with it; build them again." in result.stderr

    def test_graphs_are_asked_for_by_name(
        self,
        invoke: Callable[..., Result],
        bundle_checkpoint: Path,
        bundle: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        asked: dict[str, object] = {}
        monkeypatch.setattr("gemma_deploy.api.export", recorder(asked, bundle))
        options = ["--graphs", "portable", "--graphs", "tensorrt"]

        result = invoke("export", bundle_checkpoint, "--output", tmp_path / "out", *options)

        assert result.exit_code == 0
        assert asked["graphs"] == ("portable", "tensorrt")

    def test_tensorrt_graphs_of_a_float32_bundle(
        self, invoke: Callable[..., Result], bundle_checkpoint: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out"

        result = invoke("export", bundle_checkpoint, "-o", output, "--graphs", "tensorrt")

        assert result.exit_code == 2
        assert "TensorRT graphs of a float32 bundle were asked for" in result.stderr
        assert "export with --fp16 or --bf16, or without --graphs tensorrt" in result.stderr
        assert not output.exists()

    def test_conflicting_dtypes(self, invoke: Callable[..., Result], tmp_path: Path) -> None:
        result = invoke("export", tmp_path, "-o", tmp_path / "out", "--fp16", "--dtype", "float32")

        assert result.exit_code == 2
        assert "float16 and float32 contradict each other" in result.stderr

    def test_output_is_required(self, invoke: Callable[..., Result], tmp_path: Path) -> None:
        result = invoke("export", tmp_path)

        assert result.exit_code == 2
        assert "Missing option '--output'" in result.stderr

    def test_output_exists(
        self, invoke: Callable[..., Result], bundle_checkpoint: Path, bundle: Path
    ) -> None:
        before = (bundle / "manifest.json").stat()

        result = invoke("export", bundle_checkpoint, "-o", bundle)

        assert result.exit_code == 2
        assert "exists; use --force to replace it" in result.stderr
        assert (bundle / "manifest.json").stat() == before

    def test_a_bundle_is_no_checkpoint(
        self, invoke: Callable[..., Result], bundle: Path, tmp_path: Path
    ) -> None:
        result = invoke("export", bundle, "-o", tmp_path / "out")

        assert result.exit_code == 2
        assert (
            f"is a bundle already; export takes a checkpoint. Run it: gemma-deploy generate {bundle}"
            in result.stderr
        )

    def test_nothing_there(self, invoke: Callable[..., Result], tmp_path: Path) -> None:
        result = invoke("export", tmp_path / "nowhere", "-o", tmp_path / "out")

        assert result.exit_code == 2
        assert "does not exist; expected a checkpoint in Hugging Face layout" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_a_broken_checkpoint(
        self, invoke: Callable[..., Result], bundle_checkpoint: Path, tmp_path: Path
    ) -> None:
        broken = tmp_path / "broken"
        shutil.copytree(bundle_checkpoint, broken)
        with (broken / "model.safetensors").open("r+b") as file:
            file.truncate(10_000)

        result = invoke("export", broken, "-o", tmp_path / "out")

        assert result.exit_code == 1
        assert "Error: " in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]

    def test_ctrl_c_leaves_nothing_behind(
        self,
        start: Callable[..., "subprocess.Popen[bytes]"],
        bundle_checkpoint: Path,
        tmp_path: Path,
    ) -> None:
        with start("export", bundle_checkpoint, "-o", "out") as process:
            assert process.stderr is not None
            process.stderr.readline()
            process.send_signal(signal.SIGINT)
            stderr = process.stderr.read()

        assert process.returncode == 130
        assert stderr.endswith(b"Interrupted.\n")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
    def test_termination_leaves_nothing_behind(
        self,
        start: Callable[..., "subprocess.Popen[bytes]"],
        bundle_checkpoint: Path,
        tmp_path: Path,
        number: signal.Signals,
    ) -> None:
        with start("export", bundle_checkpoint, "-o", "out") as process:
            assert process.stderr is not None
            process.stderr.readline()
            process.send_signal(number)

        assert process.returncode == 128 + number
        assert not list(tmp_path.iterdir())

    def test_a_folder_has_no_revisions(
        self, invoke: Callable[..., Result], bundle_checkpoint: Path, tmp_path: Path
    ) -> None:
        result = invoke("export", bundle_checkpoint, "-o", tmp_path / "out", "--revision", "v1")

        assert result.exit_code == 2
        assert "revision 'v1' was given, but" in result.stderr


class TestHub:
    def test_downloads_and_exports(
        self,
        start: Callable[..., "subprocess.Popen[bytes]"],
        hub_server: "HubServer",
        bundle_checkpoint: Path,
        bundle: Path,
        tmp_path: Path,
    ) -> None:
        files = {path.name: path.read_bytes() for path in bundle_checkpoint.iterdir()}
        hub_server.models["org/tiny"] = files | {"pytorch_model.bin": b"pickle"}

        code, stdout, stderr = run_export(start, hub_server, tmp_path, "--json")

        assert code == 0, stderr
        report = json.loads(stdout)
        assert report["path"] == "out"
        made, expected = (
            json.loads((b / "manifest.json").read_text()) for b in (tmp_path / "out", bundle)
        )
        assert made["files"] == expected["files"]
        assert report["size_bytes"] == sum(f["size_bytes"] for f in made["files"].values())
        assert "pytorch_model.bin" not in hub_server.downloads

    def test_asks_for_the_revision(
        self,
        start: Callable[..., "subprocess.Popen[bytes]"],
        hub_server: "HubServer",
        tmp_path: Path,
    ) -> None:
        hub_server.models["org/tiny"] = {"config.json": b"{}", "model.safetensors": b"x"}

        code, _, stderr = run_export(start, hub_server, tmp_path, "--revision", "v9")

        assert code == 1
        assert "org/tiny has no revision 'v9'" in stderr
        assert not hub_server.downloads

    def test_gated(
        self,
        start: Callable[..., "subprocess.Popen[bytes]"],
        hub_server: "HubServer",
        tmp_path: Path,
    ) -> None:
        hub_server.models["org/tiny"] = {"config.json": b"{}", "model.safetensors": b"x"}
        hub_server.access = "gated"

        code, stdout, stderr = run_export(start, hub_server, tmp_path)

        assert (code, stdout) == (1, "")
        assert stderr.startswith(
            f"Error: org/tiny is gated: its licence must be accepted at {hub_server.endpoint}/org/tiny"
        )
        assert not (tmp_path / "out").exists()

    def test_nothing_is_downloaded_for_an_output_that_exists(
        self,
        start: Callable[..., "subprocess.Popen[bytes]"],
        hub_server: "HubServer",
        tmp_path: Path,
    ) -> None:
        hub_server.models["org/tiny"] = {"config.json": b"{}", "model.safetensors": b"x"}
        (tmp_path / "out").mkdir()

        code, _, stderr = run_export(start, hub_server, tmp_path)

        assert code == 2
        assert "out exists" in stderr
        assert not hub_server.downloads


def recorder(asked: dict[str, object], bundle: Path) -> Callable[..., Bundle]:
    """Return an export that notes what it is asked for and gives a bundle of another name."""

    def export(
        checkpoint: Path,
        output: Path,
        *,
        on_progress: Callable[[str, int, int], object],
        **options: object,
    ) -> Bundle:
        asked.update({"checkpoint": checkpoint, "output": output, **options})
        for stage, done in (("writing weights", 1), ("writing weights", 2), ("tracing", 1)):
            on_progress(stage, done, 2)
        return Bundle.open(Path(shutil.copytree(bundle, output.parent / "my bundle")))

    return export


def run_export(
    start: Callable[..., "subprocess.Popen[bytes]"],
    hub_server: "HubServer",
    folder: Path,
    *options: str,
) -> tuple[int, str, str]:
    """Export `org/tiny` to `out` in a process that knows the hub only by its environment."""
    environment = {
        "HF_ENDPOINT": hub_server.endpoint,
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }
    with start("export", "org/tiny", "-o", "out", *options, environment=environment) as process:
        stdout, stderr = process.communicate()
    return process.returncode, stdout.decode(), stderr.decode()

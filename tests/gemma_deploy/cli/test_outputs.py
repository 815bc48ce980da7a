from pathlib import Path

import click
import pytest

from gemma_deploy.cli.outputs import announce_new_folders, check_output_file, write_output


class TestNewFolders:
    def test_are_announced(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        announce_new_folders(tmp_path / "no" / "bundle")
        announce_new_folders(tmp_path / "no" / "parent" / "bundle")

        folder = tmp_path / "no"
        assert capsys.readouterr().err.splitlines() == [
            f"Note: the folder {folder} does not exist and will be made.",
            f"Note: the folder {folder / 'parent'} does not exist and will be made, with {folder} above it.",
        ]
        assert list(tmp_path.iterdir()) == []

    def test_where_there_are_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for output in (tmp_path / "bundle", Path("bundle"), Path(), tmp_path):
            announce_new_folders(output)

        assert capsys.readouterr().err == ""


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("a.png", r"--plot is .*a.png; expected a file that ends in .svg or .csv"),
            ("a", "expected a file that ends in .svg or .csv"),
            ("no/a.svg", r"the folder .*no does not exist"),
        ],
    )
    def test_that_cannot_be(self, tmp_path: Path, name: str, message: str) -> None:
        with pytest.raises(click.UsageError, match=message):
            check_output_file("--plot", tmp_path / name, ".svg", ".csv")

    def test_that_can_be(self, tmp_path: Path) -> None:
        check_output_file("--plot", tmp_path / "a.csv", ".svg", ".csv")
        check_output_file("--save", tmp_path / "anything")
        check_output_file("--save", None)

    def test_are_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_output(tmp_path / "a.txt", "π")

        assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "π"
        assert capsys.readouterr().err == f"wrote {tmp_path / 'a.txt'}\n"

    def test_that_fail(self, tmp_path: Path) -> None:
        with pytest.raises(click.ClickException, match="cannot be written: Is a directory"):
            write_output(tmp_path, "")

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.guard_trees import (
    PHASES,
    Runner,
    checked_out,
    count_instructions,
    environment,
    model_of,
    parse_perf,
)

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "samples" / "tiny-gemma"
SIZES = ["--prompt-tokens", "4", "--new-tokens", "3", "--threads", "1"]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with two commits of one file, `first` and `second`, and a change to it."""
    folder = tmp_path / "repository"
    folder.mkdir()

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
        subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True)

    git("init", "--quiet")
    for text in ("first", "second"):
        (folder / "file").write_text(text)
        git("add", "file")
        git("commit", "--quiet", "--message", text)
    (folder / "file").write_text("third")
    return folder


class TestCheckedOut:
    def test_it_has_the_commits_files_and_leaves_nothing(
        self, repository: Path, tmp_path: Path
    ) -> None:
        with checked_out("HEAD~1", tmp_path / "tree", repository) as tree:
            assert (tree / "file").read_text() == "first"

        assert not tree.exists()
        assert (repository / "file").read_text() == "third"
        assert not any((repository / ".git" / "worktrees").glob("*"))

    def test_it_leaves_nothing_after_a_failure(self, repository: Path, tmp_path: Path) -> None:
        with (
            pytest.raises(KeyboardInterrupt),
            checked_out("HEAD", tmp_path / "tree", repository) as tree,
        ):
            raise KeyboardInterrupt

        assert not tree.exists()

    def test_an_unknown_commit(
        self, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as end, checked_out("v9", tmp_path / "tree", repository):
            pass

        assert end.value.code == 2
        assert "guard: git cannot check out 'v9'" in capsys.readouterr().err


class TestRunner:
    def test_rounds_are_run_with_the_trees_code(self) -> None:
        with Runner(ROOT, [str(TINY), *SIZES]) as runner:
            rounds = [runner.run() for _ in range(2)]

        assert all(set(times) == set(PHASES) and min(times.values()) > 0 for times in rounds)

    @pytest.mark.parametrize("files", [[], ["gemma_deploy/__init__.py"]])
    def test_code_that_is_not_the_trees_is_not_measured(
        self, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """What is missing in a tree comes from the installed package."""
        for file in files:
            (tmp_path / file).parent.mkdir()
            (tmp_path / file).touch()

        with pytest.raises(SystemExit) as end:
            Runner(tmp_path, [str(TINY), *SIZES])

        assert end.value.code == 2
        assert f"{tmp_path} was to be measured, but Python imported" in capsys.readouterr().err

    def test_code_that_cannot_run_the_model(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as end:
            Runner(ROOT, [str(tmp_path / "missing"), *SIZES])

        assert end.value.code == 2
        assert f"the model did not run with the code in {ROOT}" in capsys.readouterr().err

    def test_the_tree_comes_before_other_folders(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", "other")

        assert environment(Path("tree"))["PYTHONPATH"] == os.pathsep.join(["tree", "other"])


class TestModel:
    def test_a_bundle_is_run_by_both(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.json").write_text("{}")

        assert model_of(ROOT, tmp_path, [], tmp_path / "output") == tmp_path

    def test_a_bundle_takes_no_export_options(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "manifest.json").write_text("{}")

        with pytest.raises(SystemExit):
            model_of(ROOT, tmp_path, ["--int4"], tmp_path / "output")

        assert "--export is for checkpoints" in capsys.readouterr().err

    def test_an_export_that_fails(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            model_of(ROOT, tmp_path, ["--no-such-option"], tmp_path / "output")

        assert end.value.code == 2
        assert "could not be exported with the code in" in capfd.readouterr().err


class TestInstructions:
    @pytest.mark.parametrize(
        ("text", "count"),
        [
            ("# started on Mon\n\n123456789,,instructions:u,1002003,100.00,,\n", 123456789),
            ("12345,,cpu_core/instructions:u/,1002003,100.00,,\n", 12345),
            ("<not supported>,,instructions:u,0,100.00,,\n", None),
            ("<not counted>,,instructions:u,0,0.00,,\n", None),
            ("77,,cycles:u,1002003,100.00,,\n", None),
            ("", None),
        ],
    )
    def test_what_perf_says(self, text: str, count: int | None) -> None:
        assert parse_perf(text) == count

    @pytest.mark.skipif(sys.platform == "win32", reason="perf and its stand-in are for POSIX")
    def test_start_and_loading_are_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stand-in for perf counts 1000 for the start, and 50 for each line of stdin."""
        perf = tmp_path / "perf"
        perf.write_text(
            "#!/bin/sh\n"
            'while [ "$1" != -o ]; do shift; done\n'
            'echo "$((1000 + 50 * $(wc -l))),,instructions:u,1,100.00,," > "$2"\n'
        )
        perf.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

        assert count_instructions(ROOT, [str(TINY), *SIZES]) == 50

    def test_without_perf_there_is_no_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")

        assert count_instructions(ROOT, [str(TINY), *SIZES]) is None

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_deploy.errors import ExportError, OutputExistsError
from gemma_deploy.staging import check_replaceable, staged_folder

MARK = "manifest.json"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def ours(output: Path) -> Path:
    """An output of an earlier run."""
    output.mkdir()
    (output / MARK).write_text("old")
    return output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    yield from _mounted(tmp_path / "disk", "size=64k")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield from _mounted(tmp_path / "disk", "ro")


def _mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(output: Path, *, force: bool = False, text: str = "new") -> None:
    with staged_folder(output, force=force, replaceable=MARK) as folder:
        (folder / MARK).write_text(text)


def siblings(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


def test_the_folder_appears_when_the_block_ends(output: Path) -> None:
    with staged_folder(output, force=False, replaceable=MARK) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_bytes(b"abc")
        assert not output.exists()
        assert folder.parent == output.parent
    assert (output / "sub" / "file").read_bytes() == b"abc"
    assert siblings(output) == ["out"]


def test_parents_are_created_and_permissions_follow_the_umask(tmp_path: Path) -> None:
    old_mask = os.umask(0o027)
    try:
        write(tmp_path / "a" / "b" / "out")
    finally:
        os.umask(old_mask)
    assert (tmp_path / "a" / "b" / "out").stat().st_mode & 0o777 == 0o750


def test_an_existing_output_needs_force(ours: Path) -> None:
    with pytest.raises(OutputExistsError) as caught:
        write(ours)
    assert str(caught.value) == f"{ours} exists; use --force to replace it, or another output"
    assert caught.value.exit_code == 2
    assert (ours / MARK).read_text() == "old"
    assert siblings(ours) == ["out"]


def test_force_replaces_what_we_made(ours: Path) -> None:
    (ours / "stale").touch()
    write(ours, force=True)
    assert [path.name for path in ours.iterdir()] == [MARK]
    assert (ours / MARK).read_text() == "new"
    assert siblings(ours) == ["out"]


def test_force_replaces_an_empty_folder(output: Path) -> None:
    output.mkdir()
    write(output, force=True)
    assert (output / MARK).read_text() == "new"


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_force_does_not_replace_what_others_made(output: Path, kind: str) -> None:
    thesis = output.parent / "thesis"
    if kind == "folder":
        output.mkdir()
        thesis = output / "thesis"
    elif kind == "file":
        thesis = output
    else:
        output.symlink_to(thesis)
    if kind != "dangling link":
        thesis.write_text("precious")
    message = (
        f"{output} exists and is not a folder that gemma-deploy made (no {MARK}); it is not replaced "
        "even with --force: choose another output, or remove it yourself"
    )
    with pytest.raises(OutputExistsError, match=re.escape(message)):
        write(output, force=True)
    assert kind == "dangling link" or thesis.read_text() == "precious"


def test_force_does_not_replace_a_link_to_what_we_made(ours: Path) -> None:
    link = ours.with_name("link")
    link.symlink_to(ours)
    with pytest.raises(OutputExistsError, match="it is not replaced even with --force"):
        write(link, force=True)
    assert link.readlink() == ours
    assert (ours / MARK).read_text() == "old"


def test_the_check_alone_accepts_a_free_place(output: Path) -> None:
    check_replaceable(output, force=False, replaceable=MARK)
    assert not output.exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_things_as_they_were(ours: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with staged_folder(ours, force=True, replaceable=MARK) as folder:
            (folder / MARK).write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert (ours / MARK).read_text() == "old"
    assert siblings(ours) == ["out"]


def test_a_full_disk(small_disk: Path) -> None:
    output = small_disk / "out"
    write(output, text="old")
    message = f"cannot write {output}: the disk is full. Nothing was left behind; free space or"
    with pytest.raises(ExportError, match=re.escape(message)) as caught:
        write(output, force=True, text="x" * 200_000)
    assert caught.value.exit_code == 1
    assert (output / MARK).read_text() == "old"
    assert siblings(output) == ["out"]


def test_a_file_larger_than_allowed(ours: Path) -> None:
    """Needs no rights, unlike a full disk: a write fails half-way, with an errno but no file name."""
    old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old_limits[1]))
    try:
        with pytest.raises(ExportError, match=f"cannot write {ours}: File too large"):
            write(ours, force=True, text="x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
    assert (ours / MARK).read_text() == "old"
    assert siblings(ours) == ["out"]


@pytest.mark.parametrize("path", ["out", "a/out", "a/b/out"])
def test_a_read_only_disk(read_only_disk: Path, path: str) -> None:
    output = read_only_disk / path
    with pytest.raises(ExportError, match=f"cannot write {output}: Read-only file system"):
        write(output)


@pytest.mark.parametrize("path", ["file/out", "file/a/out", "file/a/b/out"])
def test_a_parent_that_is_a_file(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=f"cannot write {tmp_path / path}: .* where a folder is"):
        write(tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"


def test_errors_of_what_is_read_are_not_taken_for_errors_of_the_output(output: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="checkpoint"),
        staged_folder(output, force=False, replaceable=MARK),
    ):
        (output.parent / "checkpoint" / "tokenizer.json").read_text()
    assert siblings(output) == []


def test_an_output_made_by_someone_else_meanwhile_is_kept(output: Path) -> None:
    def race() -> None:
        with staged_folder(output, force=False, replaceable=MARK) as folder:
            (folder / MARK).write_text("ours")
            write(output, text="theirs")

    with pytest.raises(OutputExistsError, match="use --force"):
        race()
    assert (output / MARK).read_text() == "theirs"
    assert siblings(output) == ["out"]


def test_the_old_folder_returns_when_the_new_one_cannot_be_renamed(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    calls = 0

    def fail_second(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(5, "Input/output error", str(source), None, str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(ExportError, match="Input/output error"):
        write(ours, force=True)
    assert calls == 3
    assert (ours / MARK).read_text() == "old"
    assert siblings(ours) == ["out"]


KILLED_IN_BLOCK = """
import os, signal, sys
from pathlib import Path
from gemma_deploy.staging import staged_folder
with staged_folder(Path(sys.argv[1]), force=True, replaceable="manifest.json") as folder:
    (folder / "manifest.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

KILLED_WHILE_EXCHANGING = """
import os, signal, sys
from pathlib import Path
from gemma_deploy.staging import staged_folder
rename = os.rename
def rename_and_die(source, target):
    rename(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
with staged_folder(Path(sys.argv[1]), force=True, replaceable="manifest.json") as folder:
    (folder / "manifest.json").write_text("new")
    os.rename = rename_and_die
"""


def _run_killed(program: str, output: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program, str(output)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_process_leaves_the_old_folder_and_the_next_call_cleans(ours: Path) -> None:
    _run_killed(KILLED_IN_BLOCK, ours)
    assert (ours / MARK).read_text() == "old"
    assert len(siblings(ours)) == 2
    write(ours, force=True)
    assert siblings(ours) == ["out"]


def test_death_between_the_two_renames_loses_nothing(ours: Path) -> None:
    _run_killed(KILLED_WHILE_EXCHANGING, ours)
    assert not ours.exists()
    with pytest.raises(OutputExistsError, match="use --force"):
        write(ours)
    assert (ours / MARK).read_text() == "old"
    assert siblings(ours) == ["out"]


def test_only_partial_folders_of_dead_processes_are_removed(output: Path, dead_pid: int) -> None:
    kept = {f".out.partial-{os.getppid()}-abc", f".other.partial-{dead_pid}-abc", "out.partial"}
    for name in (*kept, f".out.partial-{dead_pid}-abc"):
        (output.parent / name).mkdir()
        (output.parent / name / "file").touch()
    write(output)
    assert set(siblings(output)) == kept | {"out"}


def test_a_block_that_removes_its_folder_is_an_error(output: Path) -> None:
    with (
        pytest.raises(ExportError, match="No such file"),
        staged_folder(output, force=False, replaceable=MARK) as folder,
    ):
        folder.rmdir()
    with contextlib.suppress(FileNotFoundError):
        output.stat()
        pytest.fail("an output appeared")

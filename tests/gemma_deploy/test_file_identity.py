import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_deploy.errors import BundleError, SessionError
from gemma_deploy.file_identity import HeldFile, Snapshot, State


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "weights").write_bytes(bytes(100))
    return folder


def later(path: Path) -> None:
    """Let a file's time of change be another one, however coarse the clock."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def replace_folder(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("new"))
    folder.rename(folder.with_name("old"))
    folder.with_name("new").rename(folder)


def replace_file(folder: Path) -> None:
    shutil.copy2(folder / "weights", folder / "new")
    (folder / "new").rename(folder / "weights")


def write_over(folder: Path) -> None:
    (folder / "weights").write_bytes(bytes([1] * 100))
    later(folder / "weights")


def cut_off(folder: Path) -> None:
    os.truncate(folder / "weights", 50)


def remove_file(folder: Path) -> None:
    (folder / "weights").unlink()


def add_file(folder: Path) -> None:
    (folder / "generation_config.json").touch()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replace_folder, "bundle"),
        (replace_file, "bundle/weights"),
        (write_over, "bundle/weights"),
        (cut_off, "bundle/weights"),
        (remove_file, "bundle/weights"),
        (add_file, "generation_config.json"),
        (shutil.rmtree, "bundle"),
    ],
)
def test_what_is_noticed(folder: Path, change: Callable[[Path], None], named: str) -> None:
    names = ["manifest.json", "weights", "generation_config.json"]
    snapshot = Snapshot.of(folder, names)
    snapshot.check(BundleError, "it was being loaded")
    change(folder)
    message = f"{named} was replaced or changed while it was being loaded"
    with pytest.raises(BundleError, match=message):
        snapshot.check(BundleError, "it was being loaded")


@pytest.mark.parametrize(
    "changed",
    [lambda state: replace(state, inode=1), lambda state: replace(state, ctime_ns=1)],
    ids=["inode", "ctime"],
)
def test_one_of_inode_and_ctime_may_be_another(
    folder: Path, changed: Callable[[State | None], State]
) -> None:
    """Some network file systems hand out new inodes; a new hard link changes the ctime."""
    states = Snapshot.of(folder, ["weights"]).states
    Snapshot({path: changed(state) for path, state in states.items()}).check(BundleError, "x")


def test_other_files_of_the_folder_do_not_matter(folder: Path) -> None:
    snapshot = Snapshot.of(folder, ["manifest.json", "weights"])
    (folder / "engines").mkdir()
    (folder / "notes").touch()
    snapshot.check(BundleError, "it was being loaded")


def test_of_two_snapshots_the_earlier_counts(folder: Path) -> None:
    first = Snapshot.of(folder, ["weights"])
    write_over(folder)
    with pytest.raises(BundleError, match="weights was replaced"):
        first.joined(Snapshot.of(folder, ["manifest.json", "weights"])).check(BundleError, "x")


def test_a_held_file_that_is_replaced_or_removed_is_what_it_was(folder: Path) -> None:
    held = HeldFile(folder / "weights")
    replace_file(folder)
    held.check()
    shutil.rmtree(folder)
    held.check()
    held.close()


def test_a_held_file_that_is_changed_in_place(folder: Path) -> None:
    held = HeldFile(folder / "weights")
    held.check()
    write_over(folder)
    with pytest.raises(
        SessionError, match=r"weights was changed in place .*100 bytes then, 100 now"
    ):
        held.check()
    held = HeldFile(folder / "weights")
    os.truncate(folder / "weights", 10)
    with pytest.raises(SessionError, match=r"100 bytes then, 10 now.*Load the model again"):
        held.check()


def test_a_held_file_is_closed(folder: Path) -> None:
    def num_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = num_open()
    held = HeldFile(folder / "weights")
    assert num_open() == before + 1
    held.close()
    held.close()
    assert num_open() == before
    HeldFile(folder / "weights")  # let go at once
    assert num_open() == before

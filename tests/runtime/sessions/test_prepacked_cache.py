"""The folder itself; what ONNX Runtime writes into it is test_prepacked_graph.py's."""

import errno
import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_deploy.errors import SessionError
from gemma_deploy.runtime.sessions.prepacked_cache import (
    DATA_FILE,
    ENTRY_FILE,
    MODEL_FILE,
    PrepackedCache,
)
from gemma_deploy.staging import Lock, locked

KEY = {"graph_sha256": "aa", "cpu": "one"}
OTHER = {"graph_sha256": "aa", "cpu": "two"}
GRAPH = Path("bundle") / "prefill.onnx"
SIZE_BYTES = 5000


@pytest.fixture
def cache(tmp_path: Path) -> PrepackedCache:
    return PrepackedCache(folder=tmp_path / "cache" / "prepacked")


def fill(folder: Path) -> str:
    (folder / MODEL_FILE).write_bytes(b"model")
    (folder / DATA_FILE).write_bytes(bytes(SIZE_BYTES))
    return "made"


def write(cache: PrepackedCache, key: dict[str, str] | None = None) -> Path:
    key = KEY if key is None else key
    assert cache.write(key, fill, source=GRAPH, need_bytes=1) == "made"
    folder = cache.find(key)
    assert folder is not None
    return folder


def test_what_was_written_is_found_under_its_key_only(cache: PrepackedCache) -> None:
    assert cache.find(KEY) is None
    assert cache.entries() == []
    folder = write(cache)
    assert cache.find(dict(reversed(KEY.items()))) == folder
    assert cache.find(OTHER) is None
    (entry,) = cache.entries()
    assert (entry.folder, entry.source) == (folder, str(GRAPH.absolute()))
    assert entry.size_bytes == sum(path.stat().st_size for path in folder.iterdir()) > SIZE_BYTES
    assert cache.folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (DATA_FILE, bytes(SIZE_BYTES - 1)),
        (DATA_FILE, bytes(SIZE_BYTES)),  # another time of change
        (MODEL_FILE, b"Model"),
        (ENTRY_FILE, b"{"),
        (ENTRY_FILE, b"[]"),
        (ENTRY_FILE, b"\xff"),
        (ENTRY_FILE, b'{"key": {}}'),
    ],
)
def test_what_is_damaged_is_not_found_and_replaced(
    name: str, content: bytes, cache: PrepackedCache
) -> None:
    folder = write(cache)
    (folder / name).write_bytes(content)
    os.utime(folder / name, (1, 1))
    assert cache.find(KEY) is None
    assert len(cache.entries()) == 1
    write(cache)


@pytest.mark.parametrize("name", [DATA_FILE, MODEL_FILE, ENTRY_FILE])
def test_what_is_incomplete_is_not_found_and_replaced(name: str, cache: PrepackedCache) -> None:
    (write(cache) / name).unlink()
    assert cache.find(KEY) is None
    write(cache)


def test_another_key_in_its_folder_is_not_taken_for_it(cache: PrepackedCache) -> None:
    """Names are cut off hashes."""
    folder = write(cache)
    record = json.loads((folder / ENTRY_FILE).read_text())
    (folder / ENTRY_FILE).write_text(json.dumps(record | {"key": OTHER}))
    assert cache.find(KEY) is None


def test_a_failure_leaves_nothing_behind(cache: PrepackedCache) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise SessionError("no")

    with pytest.raises(SessionError, match=r"^no$"):
        cache.write(KEY, fail, source=GRAPH, need_bytes=1)
    assert list(cache.folder.iterdir()) == []


def test_one_writes_at_a_time(cache: PrepackedCache) -> None:
    cache.folder.mkdir(parents=True)
    with locked(cache.folder) as lock:
        assert lock is Lock.OURS
        assert cache.write(KEY, fill, source=GRAPH, need_bytes=1) is None
    assert cache.entries() == []


def test_a_folder_that_cannot_be_locked_is_told(
    cache: PrepackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_handle: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(SessionError, match=r"cannot be locked: choose a folder on a local disk"):
        cache.write(KEY, fill, source=GRAPH, need_bytes=1)
    assert list(cache.folder.iterdir()) == []


def test_what_another_has_just_written_is_not_written_again(cache: PrepackedCache) -> None:
    write(cache)
    assert cache.write(KEY, fill, source=GRAPH, need_bytes=1) is None


def test_a_killed_writers_folder_is_removed(cache: PrepackedCache) -> None:
    left = cache.folder / f".{'0' * 32}.partial-7-89ab"
    left.mkdir(parents=True)
    (left / DATA_FILE).write_bytes(b"half")
    write(cache)
    assert not left.exists()
    left.mkdir()
    cache.clear()
    assert list(cache.folder.iterdir()) == []


def test_the_least_recently_used_make_room(cache: PrepackedCache) -> None:
    cache = PrepackedCache(folder=cache.folder, max_bytes=3 * SIZE_BYTES)
    folders = []
    for number, key in enumerate((KEY, OTHER)):
        folders.append(write(cache, key))
        os.utime(folders[-1] / ENTRY_FILE, (number, number))
    assert cache.find(KEY) == folders[0]  # used again: now the other is the oldest
    third = write(cache, {"cpu": "three"})
    assert [entry.folder for entry in cache.entries()] == [third, folders[0]]


def test_the_newest_stays_however_large(cache: PrepackedCache) -> None:
    cache = PrepackedCache(folder=cache.folder, max_bytes=1)
    write(cache)
    folder = write(cache, OTHER)
    assert [entry.folder for entry in cache.entries()] == [folder]


def test_clear_removes_everything_and_says_how_much(cache: PrepackedCache) -> None:
    assert cache.clear() == 0
    write(cache)
    write(cache, OTHER)
    size_bytes = sum(entry.size_bytes for entry in cache.entries())
    assert cache.clear() == size_bytes > 2 * SIZE_BYTES
    assert list(cache.folder.iterdir()) == []


def test_clear_leaves_what_is_not_of_the_cache(cache: PrepackedCache) -> None:
    write(cache)
    (cache.folder / "mine").mkdir()
    (cache.folder / "mine" / ENTRY_FILE).write_text("keep")
    (cache.folder / ".git").mkdir()
    write(cache, OTHER)
    cache.clear()
    assert sorted(path.name for path in cache.folder.iterdir()) == [".git", "mine"]
    assert (cache.folder / "mine" / ENTRY_FILE).is_file()


def test_a_link_to_a_folder_is_as_good(cache: PrepackedCache, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    cache.folder.parent.mkdir()
    cache.folder.symlink_to(tmp_path / "elsewhere")
    write(cache)
    cache.clear()
    assert list(cache.folder.iterdir()) == []


def test_a_strangers_file_in_an_entrys_place_is_an_error(cache: PrepackedCache) -> None:
    folder = write(cache)
    shutil.rmtree(folder)
    folder.write_text("mine")
    with pytest.raises(SessionError, match=r"cannot be written: .* exists and is not a folder"):
        cache.write(KEY, fill, source=GRAPH, need_bytes=1)


def test_it_is_found_where_nothing_can_be_written(
    cache: PrepackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(cache)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.find(KEY) == folder


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = PrepackedCache(folder=tmp_path / "file" / "cache")
    assert cache.find(KEY) is None
    assert cache.clear() == 0
    with pytest.raises(
        SessionError, match=r"prepacked weights cannot be written: .*Not a directory"
    ):
        cache.write(KEY, fill, source=GRAPH, need_bytes=1)


def test_too_little_space_is_an_error_before_anything_is_written(
    cache: PrepackedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 6 << 30
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    assert cache.write(KEY, fill, source=GRAPH, need_bytes=free - (1 << 30)) == "made"
    message = re.escape(f"needs {free:,} bytes and 1,073,741,824 to spare; {free:,} are free")
    with pytest.raises(SessionError, match=message):
        cache.write(OTHER, fill, source=GRAPH, need_bytes=free)
    assert cache.find(OTHER) is None


@pytest.mark.parametrize(
    "place", ["", "ENTRY", "ENTRY/model.onnx", "ENTRY/weights.bin", "ENTRY/entry.json"]
)
@pytest.mark.parametrize("change", ["mode", "owner"])
def test_what_other_users_can_change(cache: PrepackedCache, place: str, change: str) -> None:
    entry = write(cache)
    assert cache.others_access(KEY) is None
    path = cache.folder / place.replace("ENTRY", entry.name)
    if change == "mode":
        path.chmod(path.stat().st_mode | 0o020)
    elif os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    else:
        pytest.skip("only root may give files away")
    reason = cache.others_access(KEY)
    assert reason is not None
    assert reason.startswith(f"{path} ")


def test_a_folder_that_others_may_replace(cache: PrepackedCache) -> None:
    write(cache)
    cache.folder.parent.chmod(0o777)
    assert cache.others_access(KEY) == (
        f"{cache.folder.parent} may be written by other users (mode 777)"
    )
    cache.folder.parent.chmod(0o755)
    cache.folder.rename(cache.folder.with_name("other"))
    cache.folder.symlink_to("other")  # the user's own link
    assert cache.others_access(KEY) is None


def test_an_entry_that_is_a_link(cache: PrepackedCache, tmp_path: Path) -> None:
    entry = write(cache)
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    assert cache.others_access(KEY) == f"{entry} is a symbolic link"
    assert cache.entries() == []
    assert cache.clear() == 0
    assert (tmp_path / "elsewhere" / ENTRY_FILE).exists()


def test_what_is_written_is_the_owners_whatever_the_umask(cache: PrepackedCache) -> None:
    before = os.umask(0o002)
    try:
        write(cache)
    finally:
        os.umask(before)
    assert cache.others_access(KEY) is None

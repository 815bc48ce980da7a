import contextlib
import errno
import fcntl
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from gemma_deploy import folder_exchange, staging
from gemma_deploy.errors import ExportError, OutputExistsError
from gemma_deploy.staging import _clean_up_after_the_dead, check_replaceable, staged_folder

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
def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange two folders in one step."""
    monkeypatch.setattr(staging, "exchange_folders", lambda *_: False)


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
def closed() -> Iterator[Path]:
    """A folder nobody may pass; while the test runs, root may not either."""
    # Not below tmp_path, whose parents only their owner may pass.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "closed"
        folder.mkdir(mode=0o000)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)
        folder.chmod(0o700)


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


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_what_others_made_is_not_replaced(output: Path, kind: str, force: bool) -> None:
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
        write(output, force=force)
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


@pytest.mark.usefixtures("without_exchange")
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
from gemma_deploy import folder_exchange, staging
from gemma_deploy.staging import staged_folder
staging.exchange_folders = lambda *_: False
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


def make_folders(output: Path, *names: str) -> None:
    for name in names:
        (output.parent / name).mkdir()
        (output.parent / name / MARK).write_text("left")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder as a running process does, in whichever container."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


def test_only_partial_folders_that_nobody_holds_are_removed(output: Path) -> None:
    kept = {".out.partial-1-abc", ".other.partial-1-abc", ".out.partial-mine", "out.partial"}
    make_folders(output, *kept, f".out.partial-{os.getpid()}-abc", ".out.partial-1-def")
    (output.parent / ".out.partial-1-123.old").symlink_to("out.partial")
    with held(output.parent / ".out.partial-1-abc"):
        write(output)
    assert set(siblings(output)) == kept | {"out", ".out.partial-1-123.old"}
    assert (output.parent / "out.partial" / MARK).exists()


def test_a_running_export_is_locked_from_start_to_end(output: Path) -> None:
    with staged_folder(output, force=False, replaceable=MARK) as folder:
        handle = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / MARK).touch()
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def test_nothing_is_removed_where_folders_cannot_be_locked(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folders(ours, ".out.partial-1-abc")

    def refuse(_handle: int, _operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(ours, force=True)
    assert (ours / MARK).read_text() == "new"
    assert siblings(ours) == [".out.partial-1-abc", "out"]


def test_a_folder_removed_before_it_was_locked_is_made_again(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def remove_first(handle: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (partial,) = output.parent.iterdir()
        partial.rmdir()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    write(output)
    assert siblings(output) == ["out"]


@pytest.mark.usefixtures("without_exchange")
def test_what_a_running_process_set_aside_is_not_put_back(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    seen: list[str] = []

    def interfere(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).suffix == ".old":
            monkeypatch.setattr(os, "rename", rename)
            _clean_up_after_the_dead(ours)
            seen.extend(siblings(ours))

    monkeypatch.setattr(os, "rename", interfere)
    write(ours, force=True)
    assert len(seen) == 2
    assert "out" not in seen
    assert (ours / MARK).read_text() == "new"
    assert siblings(ours) == ["out"]


def test_half_of_an_old_folder_is_never_put_back(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(folder: Path, **_: object) -> None:
        if folder.exists():
            next(folder.iterdir()).unlink()
            raise KeyboardInterrupt

    (ours / "weights").touch()
    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        write(ours, force=True)
    monkeypatch.undo()
    assert (ours / MARK).read_text() == "new"
    shutil.rmtree(ours)
    write(ours)
    assert (ours / MARK).read_text() == "new"
    assert siblings(ours) == ["out"]


@pytest.mark.parametrize(
    ("event", "is_replacing"),
    [
        ("set aside", True),
        ("in place", True),
        ("in place", False),
        ("on the disk", True),
        ("on the disk", False),
    ],
)
@pytest.mark.usefixtures("without_exchange")
def test_ctrl_c_between_the_steps_of_publishing_undoes_them(
    output: Path, monkeypatch: pytest.MonkeyPatch, event: str, is_replacing: bool
) -> None:
    if is_replacing:
        make_folders(output, "out")
    rename, fsync = os.rename, os.fsync

    def interrupted_rename(source: Path, target: Path) -> None:
        rename(source, target)
        if (event == "set aside" and Path(target).suffix == ".old") or (
            event == "in place" and Path(target) == output
        ):
            monkeypatch.undo()
            raise KeyboardInterrupt

    def interrupted_fsync(handle: int) -> None:
        fsync(handle)
        if event == "on the disk" and os.path.samestat(os.fstat(handle), output.parent.stat()):
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted_rename)
    monkeypatch.setattr(os, "fsync", interrupted_fsync)
    with pytest.raises(KeyboardInterrupt):
        write(output, force=True)
    assert siblings(output) == (["out"] if is_replacing else [])
    assert not is_replacing or (output / MARK).read_text() == "left"


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_everything_is_on_the_disk_before_the_old_folder_goes(
    ours: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_exchanged: bool,
) -> None:
    rename, fsync, rmtree = os.rename, os.fsync, shutil.rmtree
    exchange = folder_exchange.exchange_folders
    events: list[str] = []

    def record_rename(source: Path, target: Path) -> None:
        suffix = Path(target).suffix
        name = "staging" if suffix.startswith(".partial-") else suffix or Path(target).name
        events.append(f"rename to {name}")
        rename(source, target)

    def record_fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        events.append(f"fsync {'staging' if '.partial-' in path.name else path.name}")
        fsync(handle)

    def record_rmtree(folder: Path, *, ignore_errors: bool) -> None:
        events.append(f"remove {(folder / MARK).read_text()}")
        rmtree(folder, ignore_errors=ignore_errors)

    def record_exchange(one: Path, other: Path) -> bool:
        events.append("exchange" if is_exchanged else "no exchange")
        return is_exchanged and exchange(one, other)

    with staged_folder(ours, force=True, replaceable=MARK) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").touch()
        (folder / MARK).write_text("new")
        monkeypatch.setattr(os, "rename", record_rename)
        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(shutil, "rmtree", record_rmtree)
        monkeypatch.setattr(staging, "exchange_folders", record_exchange)
    parent = f"fsync {ours.parent.name}"
    renames = ["no exchange", "rename to .old", "rename to out", parent, "rename to staging"]
    steps = ["exchange", parent] if is_exchanged else renames
    assert sorted(events[:4]) == [f"fsync {MARK}", "fsync staging", "fsync sub", "fsync weights"]
    assert events[4:] == [*steps, "remove old"]


def replace_at(output: Path, step: int, act: Callable[[], None], *modules: ModuleType) -> bool:
    """Replace an output; act once, before the step-th line that is run of the modules.

    Returns:
        Whether so many lines were run.
    """
    files = {module.__file__ for module in modules}
    num_lines = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal num_lines
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            num_lines += 1
            if num_lines == step:
                act()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with staged_folder(output, force=True, replaceable=MARK) as folder:
            (folder / MARK).write_text("new")
            (folder / "sub").mkdir()
    finally:
        sys.settrace(before)
    return num_lines >= step


def ctrl_c() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_ctrl_c_at_any_point_leaves_one_whole_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_exchanged: bool,
) -> None:
    if not is_exchanged:
        monkeypatch.setattr(staging, "exchange_folders", lambda *_: False)
    seen = set()
    for step in range(1, 10_000):
        output = tmp_path / str(step) / "out"
        write(output)
        (output / MARK).write_text("old")
        try:
            if not replace_at(output, step, ctrl_c, staging, folder_exchange, shutil):
                break
        except KeyboardInterrupt:
            pass
        seen.add((output / MARK).read_text())
        assert siblings(output) == ["out"], step
    assert step > 50
    assert seen == {"old", "new"}


def test_a_process_killed_at_any_point_leaves_one_whole_folder(ours: Path) -> None:
    seen = []
    for step in range(1, 10_000):
        (ours / MARK).write_text("old")
        child = os.fork()
        if not child:
            kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
            os._exit(replace_at(ours, step, kill, staging, folder_exchange))
        _, status = os.waitpid(child, 0)
        seen.append((ours / MARK).read_text())
        if not os.WIFSIGNALED(status):
            break
    assert len(seen) > 50
    assert set(seen) == {"old", "new"}
    write(ours, force=True)
    assert siblings(ours) == ["out"]


def test_windows_flushes_files_it_may_write_and_no_folders(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlushFileBuffers refuses a handle that is only read from."""
    modes: list[int] = []
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(
        os, "fsync", lambda handle: modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
    )
    write(output)
    monkeypatch.undo()
    assert modes == [os.O_RDWR]


def test_a_failure_removes_the_parents_it_created(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()

    def fail() -> None:
        with staged_folder(tmp_path / "there" / "a" / "b" / "out", force=False, replaceable=MARK):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((tmp_path / "there").iterdir()) == []


def test_a_failure_keeps_created_parents_that_others_use(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_folder(tmp_path / "a" / "b" / "out", force=False, replaceable=MARK):
            (tmp_path / "a" / "theirs").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["theirs"]


def test_the_umask_of_the_process_is_never_changed(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's files would get its rights."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("umask changed"))
    write(output)


def check(output: Path) -> None:
    check_replaceable(output, force=True, replaceable=MARK)


@pytest.mark.parametrize("attempt", [check, write])
@pytest.mark.parametrize("path", ["out", "a/out"])
def test_an_output_in_a_folder_without_rights(
    closed: Path, attempt: Callable[[Path], None], path: str
) -> None:
    message = f"cannot write {closed / path}: Permission denied. Nothing was left behind; choose"
    with pytest.raises(ExportError, match=re.escape(message)) as caught:
        attempt(closed / path)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("attempt", [check, write])
@pytest.mark.parametrize("tail", ["", "/out"])
def test_a_name_that_is_too_long(
    tmp_path: Path, attempt: Callable[[Path], None], tail: str
) -> None:
    with pytest.raises(ExportError, match=r"cannot write .*: File name too long"):
        attempt(tmp_path / ("n" * 300 + tail))
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_leaves_no_room_for_the_partial_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot write .*: File name too long"):
        write(tmp_path / ("n" * 250))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_failed_write_that_names_no_file(ours: Path, code: int) -> None:
    def fail() -> None:
        with staged_folder(ours, force=True, replaceable=MARK):
            raise OSError(code, os.strerror(code))

    with pytest.raises(ExportError, match=f"cannot write {ours}: {os.strerror(code)}. Nothing"):
        fail()
    assert siblings(ours) == ["out"]


def test_a_block_that_removes_its_folder_is_an_error(output: Path) -> None:
    with (
        pytest.raises(ExportError, match="No such file"),
        staged_folder(output, force=False, replaceable=MARK) as folder,
    ):
        folder.rmdir()
    with contextlib.suppress(FileNotFoundError):
        output.stat()
        pytest.fail("an output appeared")

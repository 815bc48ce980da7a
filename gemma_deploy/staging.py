"""A folder that appears whole or not at all: written beside its place, flushed, renamed."""

import contextlib
import enum
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from gemma_deploy.errors import ExportError, OutputExistsError
from gemma_deploy.folder_exchange import exchange_folders

if sys.platform != "win32":
    import fcntl

_RETIRED = ".old"
# These are always about writing, whatever file they name.
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "File too large",
}
# A write that fails so names no file. Reads are not meant: a checkpoint's become CheckpointError.
_BROKEN = {errno.EIO, errno.EROFS, errno.ESTALE, errno.ENXIO, errno.ENODEV}


@contextlib.contextmanager
def staged_folder(output: Path, *, force: bool, replaceable: str) -> Iterator[Path]:
    """Give a fresh folder to write into; it becomes `output` when the block ends without an error.

    Whatever happens inside the block (an exception, a full disk, Ctrl-C), `output` is either the
    complete new folder or exactly what it was, and nothing else is left. Where the system can exchange
    two folders in one step (Linux and macOS, on local disks), one of the two is there at every moment,
    even if the process is killed. Elsewhere two renames do it.

    A killed process, or a second Ctrl-C while the first is cleaned up after, can leave hidden
    `.NAME.partial-*` folders beside it; the next call removes them, and puts the old folder back if
    the process died between the two renames. A lock on the partial folder tells a running process from
    a dead one, in whichever container it runs; where folders cannot be locked (Windows, NFS), nothing
    is removed.

    Args:
        output: The folder to create; its parent must exist or be creatable.
        force: Whether an existing `output` may be replaced.
        replaceable: Name of a file that marks a folder as ours: a folder without it is never
            replaced unless it is empty.

    Raises:
        OutputExistsError: `output` exists, now or when the block ends, and may not be replaced.
        ExportError: The disk is full or `output` cannot be written; nothing is left behind.
    """
    output = output.absolute()
    try:
        # Both stacks remove the partial folder: if Ctrl-C interrupts `undo` while it removes, `again`
        # removes what is left.
        with contextlib.ExitStack() as again, contextlib.ExitStack() as undo:
            _make_parents(output.parent, undo)
            _clean_up_after_the_dead(output)
            check_replaceable(output, force=force, replaceable=replaceable)
            staging = _make_staging(output, undo, again)
            yield staging
            _flush(staging)
            # Someone else may have written there while the block ran.
            check_replaceable(output, force=force, replaceable=replaceable)
            _publish(staging, output)
    except OSError as err:
        if not _concerns(err, output):
            raise
        raise _cannot_write(output, err) from err


def check_replaceable(output: Path, *, force: bool, replaceable: str) -> None:
    """Refuse an output that exists or cannot be, before any work is done.

    Raises:
        OutputExistsError: `output` exists and `force` is False, or it is not a folder that
            gemma-deploy made.
        ExportError: `output` cannot be looked at: a name that is too long, a folder without rights.
    """
    try:
        output.lstat()
        is_replaceable = (
            not output.is_symlink()
            and output.is_dir()
            and ((output / replaceable).is_file() or not any(output.iterdir()))
        )
    except FileNotFoundError:
        return
    except OSError as err:
        raise _cannot_write(output, err) from err
    if not is_replaceable:
        raise OutputExistsError(
            f"{output} exists and is not a folder that gemma-deploy made (no {replaceable}); "
            "it is not replaced even with --force: choose another output, or remove it yourself"
        )
    if not force:
        raise OutputExistsError(f"{output} exists; use --force to replace it, or another output")


class Lock(enum.Enum):
    """What came of the wish to lock a folder."""

    OURS = enum.auto()
    HELD = enum.auto()
    """Another process has it."""
    IMPOSSIBLE = enum.auto()
    """The file system or the operating system (Windows) locks no folders, or it is no folder."""


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[Lock]:
    """Lock a folder, give what came of it. The lock ends with the process, whatever ends it.

    Args:
        folder: An existing folder.
        wait: Whether to wait for another holder.
    """
    if sys.platform == "win32":
        yield Lock.IMPOSSIBLE
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield Lock.IMPOSSIBLE
        return
    try:
        yield _lock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def _partial_prefix(output: Path) -> str:
    return f".{output.name}.partial-"


def _concerns(err: OSError, output: Path) -> bool:
    """Tell whether an OSError is about writing the output rather than, say, reading a checkpoint."""
    if err.errno in _FULL:
        return True
    if not isinstance(err.filename, str | bytes | os.PathLike):
        return err.errno in _BROKEN
    path = Path(os.fsdecode(err.filename))
    if not path.is_relative_to(output.parent) or path == output.parent:
        return output.is_relative_to(path)
    # The checkpoint may lie beside the output.
    name = path.relative_to(output.parent).parts[0]
    return name == output.name or name.startswith(_partial_prefix(output))


def _cannot_write(output: Path, err: OSError) -> ExportError:
    remedy = (
        "free space or choose another output" if err.errno in _FULL else "choose another output"
    )
    return ExportError(f"cannot write {output}: {_reason(err)}. Nothing was left behind; {remedy}")


def _reason(err: OSError) -> str:
    if err.errno in _FULL:
        return _FULL[err.errno]
    if err.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{err.filename} lies in or is a file where a folder is needed"
    return err.strerror or str(err)


def _make_parents(folder: Path, undo: contextlib.ExitStack) -> None:
    """Create the folders that are missing; `undo` removes those that are empty in the end."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        try:
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():  # made by another process meanwhile: theirs to remove
                raise
        else:
            undo.callback(_remove_if_empty, path)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _make_staging(output: Path, undo: contextlib.ExitStack, again: contextlib.ExitStack) -> Path:
    """Create the folder to write into and hold its lock; `undo` releases it, both remove it."""
    while True:
        # The process id is for people who wonder whose it is; it means nothing in other containers.
        name = f"{_partial_prefix(output)}{os.getpid()}-{secrets.token_hex(8)}"
        staging = output.with_name(name)
        again.callback(_remove, staging)
        undo.callback(_remove, staging)
        staging.mkdir()
        undo.enter_context(locked(staging, wait=True))
        # Another process that cleans up may have seen it before it was locked.
        if staging.exists():
            return staging


def _lock(handle: int, operation: int) -> Lock:
    try:
        fcntl.flock(handle, operation)
    except BlockingIOError:
        return Lock.HELD
    except OSError:
        return Lock.IMPOSSIBLE
    return Lock.OURS


def _clean_up_after_the_dead(output: Path) -> None:
    """Remove the partial folders of processes that are gone; put back what they had set aside."""
    pattern = re.compile(
        rf"{re.escape(_partial_prefix(output))}\d+-[0-9a-f]+({re.escape(_RETIRED)})?"
    )
    for folder in output.parent.iterdir():
        if not pattern.fullmatch(folder.name):
            continue
        with locked(folder) as lock, contextlib.suppress(OSError):
            if lock is not Lock.OURS:
                continue
            if folder.suffix == _RETIRED and not os.path.lexists(output):
                folder.rename(output)
            elif folder.suffix == _RETIRED:
                # An interrupted removal leaves a part of it. Without this ending, no later call takes
                # that part for a whole folder that is to be put back.
                _remove(folder.rename(folder.with_suffix("")))
            else:
                _remove(folder)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # what an interrupted one says
        shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Force every file, and the folder's entries, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk.

    Raises:
        OSError: It cannot be opened or written.
    """
    flags = os.O_RDONLY
    if sys.platform == "win32":
        if path.is_dir():
            return  # Windows cannot open a folder for flushing
        flags = os.O_RDWR  # and flushes only what may be written
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(staging: Path, output: Path) -> None:
    """Put the finished folder in its place, durably; what was there is at `staging` then."""
    retired = staging.with_name(f"{staging.name}{_RETIRED}")
    made = staging.stat()
    # The lock moves with the folder: nobody removes it, or puts it back, before that is on the disk.
    with locked(output):
        try:
            if not output.exists():
                staging.rename(output)
            elif not exchange_folders(staging, output):
                output.rename(retired)
                staging.rename(output)
            sync(output.parent)
            if retired.exists():
                retired.rename(staging)
        except BaseException:
            # Ctrl-C, too, can come between any two steps.
            _put_back(staging, output, retired, made)
            raise


def _put_back(staging: Path, output: Path, retired: Path, made: os.stat_result) -> None:
    """Undo what `_publish` has done so far."""
    if output.exists() and os.path.samestat(output.stat(), made):
        if staging.exists() and exchange_folders(staging, output):
            return
        if staging.exists():
            staging.rename(retired)
        output.rename(staging)
    if retired.exists():
        retired.rename(output)

"""A folder that appears whole or not at all: written beside its place, flushed, renamed."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gemma_deploy.errors import ExportError, OutputExistsError


@contextlib.contextmanager
def staged_folder(output: Path, *, force: bool, replaceable: str) -> Iterator[Path]:
    """Give a fresh folder to write into; it becomes `output` when the block ends without an error.

    Whatever happens inside the block (an exception, a full disk, Ctrl-C), `output` is either the
    complete new folder or exactly what it was. A killed process can leave only a hidden
    `.NAME.partial-*` folder beside it; the next call removes it.

    Args:
        output: The folder to create; its parent must exist or be creatable.
        force: Whether an existing `output` may be replaced.
        replaceable: Name of a file that marks a folder as ours: a folder without it is never
            replaced unless it is empty.

    Raises:
        OutputExistsError: `output` exists and may not be replaced.
        ExportError: The disk is full or `output` cannot be written; nothing is left behind.
    """
    output = output.absolute()
    check_replaceable(output, force=force, replaceable=replaceable)
    staging = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        prefix = f".{output.name}.partial-{os.getpid()}-"
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        # mkdtemp makes private folders; a published one follows the umask like any other.
        staging.chmod(0o777 & ~_umask())
        yield staging
        _flush(staging)
        _publish(staging, output)
    except OSError as err:
        if not _concerns(err, output):
            raise
        reason = "the disk is full" if err.errno == errno.ENOSPC else (err.strerror or str(err))
        raise ExportError(
            f"cannot write {output}: {reason}. Nothing was left behind; free space or choose "
            "another output"
        ) from err
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def check_replaceable(output: Path, *, force: bool, replaceable: str) -> None:
    """Refuse an output that exists, before any work is done.

    Raises:
        OutputExistsError: `output` exists and `force` is False, or it is not a folder that
            gemma-deploy made.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise OutputExistsError(f"{output} exists; use --force to replace it, or another output")
    is_ours = output.is_dir() and ((output / replaceable).is_file() or not any(output.iterdir()))
    if output.is_symlink() or not is_ours:
        raise OutputExistsError(
            f"{output} exists and is not a folder that gemma-deploy made (no {replaceable}); "
            "it is not replaced even with --force: choose another output, or remove it yourself"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _concerns(err: OSError, output: Path) -> bool:
    """Tell whether an OSError is about writing the output rather than, say, reading a checkpoint."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    name = err.filename
    return name is not None and Path(os.fsdecode(name)).is_relative_to(output.parent)


def _remove_abandoned(output: Path) -> None:
    """Remove the partial folders of processes that are gone."""
    prefix = f".{output.name}.partial-"
    for folder in output.parent.iterdir():
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        if folder.name.startswith(prefix) and pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush(folder: Path) -> None:
    """Force every file, and the folder's entries, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if os.name == "nt" and path.is_dir():
            continue  # Windows cannot open a folder for flushing
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _publish(staging: Path, output: Path) -> None:
    """Rename the finished folder into place, the old one kept until that has worked."""
    if not output.exists():
        staging.rename(output)
        return
    retired = staging.with_name(f"{staging.name}.old")
    output.rename(retired)
    try:
        staging.rename(output)
    except OSError:
        retired.rename(output)
        raise
    shutil.rmtree(retired, ignore_errors=True)

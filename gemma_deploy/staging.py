"""A folder that appears whole or not at all: written beside its place, flushed, renamed."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gemma_deploy.errors import ExportError, OutputExistsError

_RETIRED = ".old"


@contextlib.contextmanager
def staged_folder(output: Path, *, force: bool, replaceable: str) -> Iterator[Path]:
    """Give a fresh folder to write into; it becomes `output` when the block ends without an error.

    Whatever happens inside the block (an exception, a full disk, Ctrl-C), `output` is either the
    complete new folder or exactly what it was. A killed process can leave only hidden
    `.NAME.partial-*` folders beside it; the next call removes them, and puts the old folder back if
    the process died while exchanging the two.

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
    staging = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        check_replaceable(output, force=force, replaceable=replaceable)
        prefix = f"{_partial_prefix(output)}{os.getpid()}-"
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        # mkdtemp makes private folders; a published one follows the umask like any other.
        staging.chmod(0o777 & ~_umask())
        yield staging
        _flush(staging)
        # Someone else may have written there while the block ran.
        check_replaceable(output, force=force, replaceable=replaceable)
        _publish(staging, output)
    except OSError as err:
        if not _concerns(err, output):
            raise
        raise ExportError(
            f"cannot write {output}: {_reason(err)}. Nothing was left behind; free space or choose "
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


def _partial_prefix(output: Path) -> str:
    return f".{output.name}.partial-"


def _concerns(err: OSError, output: Path) -> bool:
    """Tell whether an OSError is about writing the output rather than, say, reading a checkpoint."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    if err.filename is None:
        return False
    path = Path(os.fsdecode(err.filename))
    if not path.is_relative_to(output.parent) or path == output.parent:
        return output.is_relative_to(path)
    # The checkpoint may lie beside the output.
    name = path.relative_to(output.parent).parts[0]
    return name == output.name or name.startswith(_partial_prefix(output))


def _reason(err: OSError) -> str:
    if err.errno == errno.ENOSPC:
        return "the disk is full"
    if err.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{err.filename} lies in or is a file where a folder is needed"
    return err.strerror or str(err)


def _remove_abandoned(output: Path) -> None:
    """Remove the partial folders of processes that are gone; put back what they had set aside."""
    prefix = _partial_prefix(output)
    for folder in output.parent.iterdir():
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        if not folder.name.startswith(prefix) or not pid.isdigit() or _is_running(int(pid)):
            continue
        if folder.name.endswith(_RETIRED) and not output.exists():
            folder.rename(output)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if os.name == "nt":
        return True  # there os.kill ends the process it asks about; partial folders stay
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
    retired = staging.with_name(f"{staging.name}{_RETIRED}")
    output.rename(retired)
    try:
        staging.rename(output)
    except OSError:
        retired.rename(output)
        raise
    shutil.rmtree(retired, ignore_errors=True)

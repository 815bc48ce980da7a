"""Whether files are still those that they were: `Snapshot` by their paths, `HeldFile` by an open one."""

import os
import stat
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from gemma_deploy.errors import GemmaDeployError, SessionError


@dataclass(frozen=True, slots=True)
class State:
    """What the system says of a file or folder.

    Attributes:
        content: Its device; of a file its size and time of change, too.
        inode: Its inode.
        ctime_ns: When its inode was last changed, in ns.
    """

    content: tuple[int, ...]
    inode: int
    ctime_ns: int

    def is_same(self, later: "State | None") -> bool:
        """Tell whether a later look found the same file.

        One of inode and ctime may be another: some network file systems (s3fs, rclone, SMB) hand out
        new inodes for the same file, and a new name or other rights change its ctime. Of a file that
        was put in its place both are.
        """
        return (
            later is not None
            and self.content == later.content
            and (self.inode == later.inode or self.ctime_ns == later.ctime_ns)
        )


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What folders and files were at a moment, by what the system says of them: nothing is read.

    A file that is rewritten in place, to the same size, within the clock's resolution of its last
    change, is not told apart.

    Attributes:
        states: What was found at each path; None for nothing.
    """

    states: Mapping[Path, State | None] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, files: Iterable[str]) -> Self:
        """Look at a folder, and at files in it."""
        paths = [folder, *(folder / name for name in files)]
        return cls({path: _state(path) for path in paths})

    def joined(self, later: "Snapshot") -> "Snapshot":
        """Return both; where they speak of the same path, what this one says."""
        return Snapshot({**later.states, **self.states})

    def check(self, error: type[GemmaDeployError], doing: str) -> None:
        """Raise an error if anything is not what it was.

        Args:
            error: Its class.
            doing: What was going on meanwhile, for the message: `the bundle was being loaded`.
        """
        for path, state in self.states.items():
            found = _state(path)
            if found is not state and not (state and state.is_same(found)):
                raise error(
                    f"{path} was replaced or changed while {doing}, so that parts of two could have "
                    "been mixed: do it again, now that it is there"
                )


class HeldFile:
    """A file that something maps, held open to notice that it was changed in place.

    A mapped file that is cut off kills whoever reads it (SIGBUS), and one that is written over (`cp NEW
    OLD`) is read half old, half new. Replacing a file by renaming another one, as exports do, is
    harmless: what is mapped stays as it was. A change between `check` and the reading that follows it
    is not noticed in time.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            OSError: It cannot be opened.
        """
        self._path = path
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._close = weakref.finalize(self, os.close, self._handle)
        self._state = self._now()

    def check(self) -> None:
        """Compare size and time of change with those of the beginning: microseconds.

        Raises:
            SessionError: They are others.
        """
        try:
            now = self._now()
        except OSError as err:  # a network file system that lost it
            raise SessionError(
                f"{self._path}, which the loaded model reads, is gone: {err.strerror}. Load the model again"
            ) from err
        if now != self._state:
            raise SessionError(
                f"{self._path} was changed in place after the model was loaded from it "
                f"({self._state[0]:,} bytes then, {now[0]:,} now): what is loaded is half of the one and "
                "half of the other. Load the model again; files of a loaded model may be replaced by "
                "renaming others, as `gemma-deploy export --force` does, but not written over"
            )

    def close(self) -> None:
        """Close the file; there is no more to check."""
        self._close()

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._handle)
        return found.st_size, found.st_mtime_ns


def _state(path: Path) -> State | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    of_file = () if stat.S_ISDIR(found.st_mode) else (found.st_size, found.st_mtime_ns)
    return State((found.st_dev, *of_file), found.st_ino, found.st_ctime_ns)

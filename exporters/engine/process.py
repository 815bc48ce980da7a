"""The parent's side of a build in a child process: `build_in_child`."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, Final, cast

from gemma_deploy.errors import EngineBuildError
from gemma_deploy.exporters.engine.builder import OnProgress
from gemma_deploy.file_records import FileRecord

if TYPE_CHECKING:  # a module that was imported before warns when it is run
    from gemma_deploy.exporters.engine.child import BuildRequest

_MODULE: Final = "gemma_deploy.exporters.engine.child"
_SHOWN_LINES: Final = 20
_SIGKILL: Final = 9  # Windows has no such name


def build_in_child(request: "BuildRequest", on_progress: OnProgress) -> FileRecord:
    """Build a plan in a process of its own, and wait for it.

    Whatever ends this call ends that process.

    Args:
        request: What to build.
        on_progress: Called as the work goes on, in this thread.

    Returns:
        Size and SHA-256 of the plan.

    Raises:
        EngineBuildError: The build failed, or its process crashed or was killed; with what the
            library said.
        OSError: The plan cannot be written.
    """
    said: list[str] = []
    with tempfile.TemporaryFile() as errors, _child(errors) as process:
        for message in _messages(process, request):
            match message["kind"]:
                case "progress":
                    on_progress(message["stage"], message["done"], message["total"])
                case "library_error":
                    said.append(message["text"])
                case "error":
                    raise EngineBuildError(message["text"])
                case "os_error":
                    raise OSError(message["errno"], message["reason"], message["filename"])
                case "done":
                    return FileRecord(size_bytes=message["size_bytes"], sha256=message["sha256"])
        raise _ended_early(process.wait(), said, errors)


@contextlib.contextmanager
def _child(errors: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the child; its end is the end of the block."""
    process = subprocess.Popen(  # noqa: S603 - our own module, run by our own interpreter
        # -P: files in the current folder must not pass for modules.
        [sys.executable, "-P", "-m", _MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _messages(
    process: subprocess.Popen[bytes], request: "BuildRequest"
) -> Iterator[Mapping[str, Any]]:
    """Send the request and yield what comes back. stdin stays open: its end would end the child."""
    stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
    with contextlib.suppress(BrokenPipeError):  # it died at once: there is nothing to read either
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
    for line in stdout:
        if line.endswith(b"\n"):  # a process that is killed may leave half a line
            yield json.loads(line)


def _ended_early(code: int, said: list[str], errors: IO[bytes]) -> EngineBuildError:
    """Explain the end of a child that gave no result."""
    if code == -_SIGKILL:
        what = (
            "was killed (SIGKILL), most often by the system when memory runs out: close other "
            "programs or build on a machine with more memory"
        )
    elif code < 0:
        what = f"crashed ({signal.Signals(-code).name})"
    else:
        what = f"ended with exit code {code}"
    errors.seek(0)
    printed = errors.read().decode(errors="replace").splitlines()[-_SHOWN_LINES:]
    lines = [*dict.fromkeys(said), *printed]
    text = "\n".join(line for line in lines if line.strip()) or "(it said nothing)"
    return EngineBuildError(
        f"the process that built the engine {what}. Nothing was left behind. It said last:\n{text}"
    )

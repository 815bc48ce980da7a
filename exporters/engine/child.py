"""The child process that builds one plan: `python -m gemma_deploy.exporters.engine.child`.

It reads a request, one line of JSON, from stdin, and writes messages, one line of JSON each, to
stdout; `gemma_deploy.exporters.engine.process` is the other end. It lives no longer than its parent:
when stdin ends, so does it.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, cast

from gemma_deploy.bundle import Bundle
from gemma_deploy.engine_build import EngineBuild
from gemma_deploy.errors import GemmaDeployError
from gemma_deploy.exporters.engine.builder import PlanJob, write_plan
from gemma_deploy.exporters.engine.profiles import optimization_profiles
from gemma_deploy.graph_spec import Phase
from gemma_deploy.tensorrt import load_library


class BuildRequest(TypedDict):
    """What the child is asked to do.

    Attributes:
        bundle: The bundle's folder.
        build: `EngineBuild.to_dict()`.
        phase: Phase of the graph to build from.
        plan: The file to create.
    """

    bundle: str
    build: dict[str, Any]
    phase: Phase
    plan: str


class _Messages:
    """Writes messages whole: the library's threads send them too."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lock = threading.Lock()

    def send(self, kind: str, **body: object) -> None:
        line = json.dumps({"kind": kind, **body}).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()


def build_plan(request: BuildRequest, messages: _Messages) -> None:
    """Build the plan of a request, telling of progress and errors as they come."""
    from gemma_deploy.exporters.engine.prepared_graph import prepare_graph

    build = EngineBuild.from_dict(request["build"])
    bundle = Bundle.open(Path(request["bundle"]))
    library = load_library(build.flavour)
    library.log.on_error = lambda text: messages.send("library_error", text=text)
    messages.send("progress", stage="preparing the graph", done=0, total=1)
    graph, spec = prepare_graph(bundle, request["phase"], build, library)
    job = PlanJob(
        build=build,
        graph=graph,
        spec=spec,
        profiles=optimization_profiles(spec, request["phase"], build.layout, build.limits),
    )
    shown: dict[str, int] = {}

    def on_progress(stage: str, done: int, total: int) -> None:
        if shown.get(stage) != done:
            shown[stage] = done
            messages.send("progress", stage=stage, done=done, total=total)

    record = write_plan(library, job, Path(request["plan"]), on_progress)
    messages.send("done", size_bytes=record.size_bytes, sha256=record.sha256)


def main() -> None:
    """Serve one request; never returns."""
    # Ctrl-C reaches every process of a terminal: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    messages = _Messages(os.fdopen(os.dup(sys.stdout.fileno()), "wb"))
    # What libraries print must not end up between the messages.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = cast(BuildRequest, json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        build_plan(request, messages)
    except GemmaDeployError as err:
        messages.send("error", text=str(err))
    except OSError as err:
        messages.send("os_error", **_describe(err))
    # Unloading the library could still crash, and freeing its memory takes a while.
    sys.stderr.flush()
    os._exit(0)


def _describe(err: OSError) -> Mapping[str, object]:
    filename = None if err.filename is None else os.fsdecode(err.filename)
    return {"errno": err.errno, "reason": err.strerror or str(err), "filename": filename}


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()

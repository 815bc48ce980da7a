"""The child process of one contender: `python -m gemma_deploy.runtime.benchmark.worker`.

It reads lines of JSON from stdin, first the `ContenderSpec` and then one case after the other, and
answers each with one line on stdout; `gemma_deploy.runtime.benchmark.worker_process` is the other
end. It lives no longer than its parent: when stdin ends, so does it.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from gemma_deploy.errors import GemmaDeployError
from gemma_deploy.runtime.benchmark.contenders import load_contender
from gemma_deploy.runtime.benchmark.gpu_memory import process_gpu_bytes
from gemma_deploy.runtime.benchmark.plan import ContenderSpec
from gemma_deploy.runtime.benchmark.process_memory import read_memory
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase
from gemma_deploy.runtime.benchmark.rounds import CaseRunner

Read = Callable[[], dict[str, Any]]
Send = Callable[[dict[str, Any]], None]


def serve(read: Read, send: Send) -> None:
    """Load a contender and run the cases that are asked for; never returns."""
    spec = ContenderSpec(**read())
    _offer_to_out_of_memory_killer(spec)
    started_s = time.perf_counter()
    contender = load_contender(spec)
    limits = contender.session.limits
    send(
        {
            "load_s": time.perf_counter() - started_s,
            "description": contender.description,
            "device": contender.device,
            "max_seq_len": limits.max_seq_len,
            "max_batch_size": limits.max_batch_size,
            **_memory(contender.device),
        }
    )
    running: tuple[BenchCase, CaseRunner] | None = None
    while True:
        case = BenchCase(**read())
        if running is None or running[0] != case:
            if running is not None:
                running[1].free()  # before its successor allocates
            running = case, contender.case_runner(case)
            for _ in range(contender.extra_warmup):
                running[1].run()
        times = running[1].run()
        send({"ttft_s": times.ttft_s, "step_s": times.step_s, **_memory(contender.device)})


def _memory(device: str) -> dict[str, int | None]:
    memory = read_memory()
    return {
        "peak_bytes": memory.peak_bytes,
        "anonymous_bytes": memory.anonymous_bytes,
        "gpu_bytes": process_gpu_bytes(os.getpid()) if device == "cuda" else None,
    }


def _offer_to_out_of_memory_killer(spec: ContenderSpec) -> None:
    """Let the system kill a contender rather than the program, and a baseline rather than ours."""
    score = Path("/proc/self/oom_score_adj")
    # A container may forbid it, or start its processes with a higher score that they may not lower.
    with contextlib.suppress(OSError):
        score.write_text("300" if spec.name == OURS else "600", encoding="ascii")


def main() -> None:
    """Serve the parent; never returns."""
    # Ctrl-C reaches every process of a terminal: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # What libraries print must not end up between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=[requests], daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        _write(answers, message)

    try:
        serve(lambda: json.loads(requests.get()), send)
    except GemmaDeployError as err:
        send({"error": type(err).__name__, "text": str(err)})
    except MemoryError:
        send({"error": "SessionError", "text": "it ran out of memory"})
    # Freeing the model takes a while, and unloading libraries could still crash.
    sys.stderr.flush()
    os._exit(0)


def _write(file: BinaryIO, message: dict[str, Any]) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def _read_requests(requests: queue.SimpleQueue[bytes]) -> None:
    """Hand on each line; the end of stdin is the end of the process, whatever it is doing."""
    for line in sys.stdin.buffer:
        requests.put(line)
    os._exit(1)


if __name__ == "__main__":
    main()

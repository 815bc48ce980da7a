"""The parent's side of a contender in a child process: `Worker`."""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
from typing import IO, Any, Final, Self, cast

from gemma_deploy import errors
from gemma_deploy.errors import SessionError
from gemma_deploy.runtime.benchmark.plan import ContenderSpec
from gemma_deploy.runtime.benchmark.results import (
    BenchCase,
    Contender,
    RoundTimes,
    larger,
)

_MODULE: Final = "gemma_deploy.runtime.benchmark.worker"
_SHOWN_LINES: Final = 20
_SIGKILL: Final = 9  # Windows has no such name


class Worker:
    """A contender in a process of its own; a context manager that ends the process.

    Its memory is its own to be measured, and when the system kills it the parent goes on.

    Attributes:
        contender: What is known of it so far.
        device: What it runs on, `cpu` or `cuda`; empty before `load`.
        max_seq_len: Most tokens of a row, by what was loaded; None for any.
        max_batch_size: Most rows, likewise.
    """

    def __init__(self, spec: ContenderSpec) -> None:
        """Start the process; nothing is loaded yet."""
        self.contender = Contender(name=spec.name)
        self.device = ""
        self.max_seq_len: int | None = None
        self.max_batch_size: int | None = None
        self._spec = spec
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._process = subprocess.Popen(  # noqa: S603 - our own module, run by our own interpreter
            # -P: files in the current folder must not pass for modules.
            [sys.executable, "-P", "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self) -> None:
        """Load the model.

        Raises:
            GemmaDeployError: It cannot be loaded; SessionError if the process crashed or was killed.
        """
        answer = self._ask(dataclasses.asdict(self._spec))
        self.device = answer["device"]
        self.max_seq_len = answer["max_seq_len"]
        self.max_batch_size = answer["max_batch_size"]
        self.contender = dataclasses.replace(
            self.contender, description=answer["description"], load_s=answer["load_s"]
        )

    def run(self, case: BenchCase) -> RoundTimes:
        """Run a case once.

        Raises:
            GemmaDeployError: It failed; SessionError if the process crashed or was killed.
        """
        answer = self._ask(dataclasses.asdict(case))
        return RoundTimes(ttft_s=answer["ttft_s"], step_s=tuple(answer["step_s"]))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)
        with contextlib.suppress(BrokenPipeError):  # it ended: there is nothing to read either
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        line = stdout.readline()
        if not line.endswith(b"\n"):  # a process that is killed may leave half a line
            raise self._ended_early()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise cast(type[errors.GemmaDeployError], getattr(errors, answer["error"]))(
                answer["text"]
            )
        self.contender = dataclasses.replace(
            self.contender,
            peak_memory_bytes=answer["peak_bytes"],
            peak_anonymous_bytes=larger(
                self.contender.peak_anonymous_bytes, answer["anonymous_bytes"]
            ),
            peak_gpu_bytes=larger(self.contender.peak_gpu_bytes, answer["gpu_bytes"]),
        )
        return answer

    def _ended_early(self) -> SessionError:
        """Explain the end of a child that gave no answer."""
        code = self._process.wait()
        if code == -_SIGKILL:
            return SessionError(
                f"the process of {self._spec.name} was killed (SIGKILL), most often by the system "
                "when memory runs out: close other programs, or measure smaller cases"
            )
        how = f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
        self._stderr.seek(0)
        printed = self._stderr.read().decode(errors="replace").splitlines()[-_SHOWN_LINES:]
        text = "\n".join(line for line in printed if line.strip()) or "(it said nothing)"
        return SessionError(f"the process of {self._spec.name} {how}. It said last:\n{text}")

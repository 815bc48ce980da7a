"""Ends a test that hangs; one that a busy or throttled machine starves only takes longer.

What counts is what the processes do, this one and all that the test started, never the clock alone. A test
hangs if for `hang_idle_s` none of them computes, waits for a core or waits for a disk, as in a deadlock or
a wait for a child that died. It hangs too once they have computed for `hang_busy_s`, as in an endless loop.

It then fails, with the stacks of all threads, what it started is killed, and the next test runs. Only where
it cannot be interrupted, as inside of a library, this process ends. pytest-xdist then starts another, where
that test is skipped.

It reads Linux's /proc; elsewhere nothing is watched.
"""

import faulthandler
import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

# Looking again and again whether something has happened takes less of a core than this.
_IDLE_SHARE = 0.02
_LOOKS = 60  # in `hang_idle_s`
# Progress that is seen once takes back as many looks without any: loops as above are seen too, now and then.
_FORGIVEN_LOOKS = 10
# An interrupted test may clean up for this share of the limits.
_CLEANUP_SHARE = 0.1
# States of a thread that goes on by itself: it computes or waits for a core, or waits for a disk.
_PROGRESSING = {"R", "D"}
_SHOWN_FRAMES = 12  # of each thread, the innermost


def _tick_s() -> float:
    """Return what times of processes are counted in, which Windows does not have."""
    return 1 / os.sysconf("SC_CLK_TCK")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("hang_idle_s", "Seconds of doing nothing that end a test.", "float", 300.0)
    parser.addini("hang_busy_s", "Seconds of computing that end a test.", "float", 1800.0)


def pytest_configure(config: pytest.Config) -> None:
    if Path("/proc/self/task").is_dir():
        config.pluginmanager.register(HangWatch(config))


class HangWatch:
    """Watches every test."""

    def __init__(self, config: pytest.Config) -> None:
        self._limits: tuple[float, float] = (
            config.getini("hang_idle_s"),
            config.getini("hang_busy_s"),
        )
        self._stderr = os.dup(2)  # before pytest captures it
        self._run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
        self._watch: _Watch | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._watch = watch = _Watch(item, *self._limits, self._stderr)
        before = signal.signal(signal.SIGUSR1, watch.fail)
        watch.start()
        try:
            return (yield)
        finally:
            watch.stop()
            signal.signal(signal.SIGUSR1, before)
            self._mark(item).unlink(missing_ok=True)

    def pytest_enter_pdb(self) -> None:
        """Leave a test alone that waits for its debugger."""
        if self._watch is not None:
            self._watch.stop()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Mark the test as one that runs, and skip it if it ran when another process ended."""
        if self._run is None:
            return
        try:
            self._mark(item).touch(exist_ok=False)
        except FileExistsError:
            pytest.skip("the process that ran it ended")

    def _mark(self, item: pytest.Item) -> Path:
        name = hashlib.sha256(f"{self._run} {item.nodeid}".encode()).hexdigest()
        return Path(tempfile.gettempdir()) / f"gemma-deploy-test-{name}"


class _Watch(threading.Thread):
    """Watches one test, from beside it."""

    def __init__(self, item: pytest.Item, idle_s: float, busy_s: float, stderr: int) -> None:
        super().__init__(name="hang watch", daemon=True)
        self._item, self._idle_s, self._busy_s, self._stderr = item, idle_s, busy_s, stderr
        self._is_over = threading.Event()
        self._before = set(_family(os.getpid()))
        self._reason = ""

    def start(self) -> None:
        self._watch_the_watch()
        super().start()

    def run(self) -> None:
        for end, share in ((self._interrupt, 1.0), (self._exit, _CLEANUP_SHARE)):
            if not self._hangs(share):
                return
            end()

    def stop(self) -> None:
        """Stop watching: the test is over."""
        self._is_over.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()

    def fail(self, *_: object) -> None:
        """Fail the test, as the handler of a signal: that ends waiting and sleeping."""
        __tracebackhide__ = True
        if not self._is_over.is_set():
            pytest.fail(self._reason)

    def _hangs(self, share: float) -> bool:
        """Wait until the test is over or hangs; tell which."""
        interval_s = self._idle_s / _LOOKS
        idle_s = busy_s = 0.0
        used_s = self._used_s()
        while not self._is_over.wait(interval_s):
            before_s, used_s = used_s, self._used_s()
            # Intervals are counted, not read off a clock, which runs on while this process is stopped.
            if _is_progressing() or used_s - before_s > _IDLE_SHARE * interval_s + 2 * _tick_s():
                idle_s = max(0, idle_s - _FORGIVEN_LOOKS * interval_s)
            else:
                idle_s += interval_s
            busy_s += min(max(used_s - before_s, 0), interval_s)
            if idle_s >= share * self._idle_s:
                self._reason = self._reason or f"hangs: did nothing for {idle_s:.0f} s"
                return True
            if busy_s >= share * self._busy_s:
                self._reason = self._reason or f"hangs: still computes after {busy_s:.0f} s of it"
                return True
            self._watch_the_watch()
        return False

    def _used_s(self) -> float:
        """Return the processor time of all processes so far, without the watch's own."""
        ticks = 0
        for pid in _family(os.getpid()):
            if stat := _stat(Path(f"/proc/{pid}")):
                # In user and in system mode, its own and that of children that ended.
                ticks += sum(map(int, stat[11:15]))
        return ticks * _tick_s() - time.thread_time()

    def _watch_the_watch(self) -> None:
        """End the process if a call of a library keeps this thread, too, from running: the one clock."""
        faulthandler.dump_traceback_later(2 * self._busy_s, exit=True, file=self._stderr)

    def _interrupt(self) -> None:
        self._item.add_report_section("call", "stacks", _stacks())
        for pid in set(_family(os.getpid())) - self._before:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGUSR1)

    def _exit(self) -> None:
        said = f"\n{self._item.nodeid} {self._reason} and cannot be interrupted\n{_stacks()}"
        os.write(self._stderr, said.encode())
        os._exit(1)


def _stacks() -> str:
    """Return where every thread is but the asking one."""
    frames = sys._current_frames()
    lines = []
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.ident in frames:
            stack = traceback.extract_stack(frames[thread.ident], _SHOWN_FRAMES)
            lines += [f"{thread.name}:\n", *traceback.format_list(stack)]
    return "".join(lines)


def _is_progressing() -> bool:
    """Tell whether a thread of any process, but the asking one, goes on by itself."""
    me = threading.get_native_id()
    return any(
        stat and stat[0] in _PROGRESSING
        for pid in _family(os.getpid())
        for thread in Path(f"/proc/{pid}/task").glob("*")
        if thread.name != str(me)
        for stat in (_stat(thread),)
    )


def _stat(folder: Path) -> list[str]:
    """Return what /proc says of a process or thread from its state on; nothing of one that ended."""
    try:
        return (folder / "stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return []


def _family(pid: int) -> Iterator[int]:
    """Yield a process and all that it started."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it ended since
            for child in path.read_text("ascii").split():
                yield from _family(int(child))

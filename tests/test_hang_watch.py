import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc"),
]


@pytest.fixture(autouse=True)
def _short_limits(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch the tests of a test with limits that are reached soon."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("COLUMNS", "200")  # nothing is cut off
    pytester.makeconftest('pytest_plugins = ["tests.hang_watch"]')
    pytester.makeini("[pytest]\nhang_idle_s = 1.5\nhang_busy_s = 3.0")


def run(pytester: pytest.Pytester, source: str) -> pytest.RunResult:
    """Run a module of tests in one process of pytest-xdist."""
    pytester.makepyfile(source)
    return pytester.runpytest_subprocess("-n1", "--dist=loadscope", "-p", "no:cacheprovider")


def test_what_hangs_fails_and_the_next_test_runs(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import subprocess, sys, threading, time

        def test_waits_for_itself():
            lock = threading.Lock()
            with lock, lock:
                pass

        def test_waits_for_a_child():
            with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as child:
                child.wait()

        def test_looks_again_and_again():
            while True:
                time.sleep(0.05)

        def test_computes_without_end():
            while True:
                pass

        def test_waits_for_a_child_that_computes_without_end():
            subprocess.run([sys.executable, "-c", "while True: pass"])

        def test_after_them():
            pass
        """,
    )

    result.assert_outcomes(passed=1, failed=5)
    result.stdout.fnmatch_lines(
        [
            "*FAILED *test_waits_for_itself - Failed: hangs: did nothing for * s*",
            "*FAILED *test_waits_for_a_child - Failed: hangs: did nothing for * s*",
            "*FAILED *test_looks_again_and_again - Failed: hangs: did nothing for * s*",
            "*FAILED *test_computes_without_end - Failed: hangs: still computes after * s*",
            "*FAILED *test_waits_for_a_child_that_computes_without_end - Failed: hangs: still *",
        ]
    )
    result.stdout.fnmatch_lines(["*in test_waits_for_itself*"])


def test_what_cannot_be_interrupted_ends_its_process_once(pytester: pytest.Pytester) -> None:
    result = run(
        pytester,
        """
        import ctypes

        def test_waits_inside_of_a_library():
            library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            for _ in range(2):
                library.pthread_mutex_lock(mutex)

        def test_after_it():
            pass
        """,
    )

    result.assert_outcomes(passed=1, failed=1, skipped=1)
    result.stderr.fnmatch_lines(
        [
            "*test_waits_inside_of_a_library hangs: did nothing * and cannot be interrupted",
            "*in test_waits_inside_of_a_library",
        ]
    )


@pytest.fixture
def busy_core() -> Iterator[int]:
    """Return a core that a process keeps busy."""
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    yield core
    process.kill()
    process.wait()


def test_what_is_starved_goes_on(pytester: pytest.Pytester, busy_core: int) -> None:
    """On a busy core, for a fraction of a percent of it: for longer than a test may be idle."""
    result = run(
        pytester,
        f"""
        import subprocess, sys

        STARVED = '''
        import os, time
        os.sched_setaffinity(0, {{{busy_core}}})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        start = time.process_time()
        while time.process_time() - start < 0.01:
            pass
        '''

        def test_starved():
            subprocess.run([sys.executable, "-c", STARVED.replace("        ", "", 6)], check=True)
        """,
    )

    result.assert_outcomes(passed=1)

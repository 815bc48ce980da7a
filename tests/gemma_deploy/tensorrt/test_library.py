import builtins
import ctypes
import subprocess
import sys
from typing import Any

import pytest

from gemma_deploy.errors import BackendUnavailableError
from gemma_deploy.tensorrt import load_library
from gemma_deploy.tensorrt.log import TensorRTLog


def test_rtx_loads_and_can_make_a_builder() -> None:
    library = load_library("tensorrt-rtx")
    assert library.version.startswith("1.")
    assert library.module.Builder(library.log.logger) is not None


def test_a_missing_library_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailableError, match=r'pip install .*\[tensorrt\]"'):
        load_library("tensorrt")


def test_an_emptied_package_is_not_taken_for_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "tensorrt", type(builtins)("tensorrt"))
    with pytest.raises(BackendUnavailableError, match="installed incompletely"):
        load_library("tensorrt")


def test_a_package_that_cannot_open_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    load_library.cache_clear()
    monkeypatch.setattr("gemma_deploy.tensorrt.library.importlib.import_module", fail)
    with pytest.raises(
        BackendUnavailableError, match=r"libcudart.so.13: cannot open .* pip install"
    ):
        load_library("tensorrt")


_OPEN = "import ctypes; print(ctypes.CDLL('libtensorrt_rtx.so').getInferLibVersion())"


def test_the_parser_finds_rtx_by_its_unversioned_name() -> None:
    """In processes of their own: a name once given stays."""
    plain = "import tensorrt_rtx;"
    loaded = "from gemma_deploy.tensorrt import load_library; load_library('tensorrt-rtx');"
    before, after = (
        subprocess.run(
            [sys.executable, "-c", code + _OPEN], check=False, capture_output=True, text=True
        )
        for code in (plain, loaded)
    )
    assert "libtensorrt_rtx.so: cannot open" in before.stderr
    assert after.stdout.strip() == str(ctypes.CDLL("libtensorrt_rtx.so.1").getInferLibVersion())


class _Module:
    class ILogger:
        pass


def _log() -> tuple[TensorRTLog, Any]:
    class Severity:
        def __init__(self, name: str) -> None:
            self.name = name

    log = TensorRTLog(_Module)
    return log, lambda name, text: log.logger.log(Severity(name), text)


def test_errors_are_kept_once_and_taken_once() -> None:
    log, say = _log()
    for text in ("no kernel ", "no kernel", "out of memory"):
        say("ERROR", text)
    say("WARNING", "slow")
    assert log.take_errors() == "no kernel\nout of memory"
    assert not log.take_errors()


def test_only_the_latest_errors_are_kept() -> None:
    log, say = _log()
    for number in range(80):
        say("INTERNAL_ERROR", f"error {number}")
    assert log.take_errors().splitlines() == [f"error {number}" for number in range(30, 80)]

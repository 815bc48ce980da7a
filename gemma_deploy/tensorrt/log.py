"""What TensorRT says, kept so that an error can quote it: `TensorRTLog`."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

_KEPT_LINES: Final = 50
_LOGGER: Final = logging.getLogger("gemma_deploy.tensorrt")


class TensorRTLog:
    """A logger for TensorRT that keeps its errors and hands everything to Python's logging.

    Failures of the library are return values (None, False); the reason is only in its log.

    Attributes:
        logger: The `ILogger` to give to `Builder`, `OnnxParser` and `Runtime`.
        on_error: Called with each error as it comes, from any thread: for a process that may not
            live to ask for them.
    """

    def __init__(self, module: Any) -> None:
        """Create the logger; nothing is registered yet.

        Args:
            module: `tensorrt` or `tensorrt_rtx`.
        """
        self._errors: deque[str] = deque(maxlen=_KEPT_LINES)
        self.on_error: Callable[[str], object] = lambda _: None
        self._lock = threading.Lock()  # builders log from threads of their own
        self.logger: Any = _logger_class(module)(self.add)

    def add(self, severity: str, text: str) -> None:
        """Take a line.

        Args:
            severity: TensorRT's name of it: INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE.
            text: The line.
        """
        if severity in {"INTERNAL_ERROR", "ERROR"}:
            with self._lock:
                self._errors.append(text.strip())
            self.on_error(text.strip())
            return  # errors reach the user in an exception
        # The library's warnings are for those who ask: no build is without them.
        _LOGGER.log(logging.INFO if severity == "WARNING" else logging.DEBUG, "%s", text)

    def take_errors(self) -> str:
        """Return the errors since the last call, one per line and each once, and forget them."""
        with self._lock:
            lines = list(dict.fromkeys(self._errors))
            self._errors.clear()
        return "\n".join(lines)


def _logger_class(module: Any) -> Any:
    """Derive from the module's own ILogger: bindings accept no other."""

    class Logger(module.ILogger):  # type: ignore[misc]  # the base is only known at run time
        def __init__(self, add: Any) -> None:
            module.ILogger.__init__(self)
            self._add = add

        def log(self, severity: Any, msg: str) -> None:
            self._add(severity.name, msg)

    return Logger

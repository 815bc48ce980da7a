"""What a sweep has measured so far, in memory and, if asked for, in a file to go on from: `BenchRecord`.

The file is lines of JSON, each written as soon as it is known: what was asked for, then rooflines,
contenders and whole rounds. A process that is killed loses the round it was in.
"""

import contextlib
import dataclasses
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from gemma_deploy.errors import RequestError
from gemma_deploy.json_files import parse_json, read_bytes
from gemma_deploy.json_values import typed
from gemma_deploy.limits import MAX_RECORD_BYTES
from gemma_deploy.quoting import shortened
from gemma_deploy.runtime.benchmark.plan import BenchPlan
from gemma_deploy.runtime.benchmark.results import (
    LOAD,
    BenchCase,
    BenchReport,
    Contender,
    Measurement,
    Roofline,
    RoundTimes,
    larger,
)

_FORMAT_VERSION: Final = 1
_REMEDY: Final = "name another file, or remove this one"
# Facts of the environment that change from day to day without changing what is measured.
_PASSING: Final = ("date", "clock", "system", LOAD)


class BenchRecord:
    """The rounds, contenders and roofline of one plan.

    Attributes:
        roofline: None before it is measured.
    """

    def __init__(
        self, plan: BenchPlan, environment: Mapping[str, str], file: Path | None = None
    ) -> None:
        """Begin a record, or go on with the one in the file.

        Args:
            plan: What is measured.
            environment: Where.
            file: Where to keep it; created with the first thing that is known. None keeps it in memory only.

        Raises:
            RequestError: The file holds something else, or the rounds of another plan.
            OSError: It cannot be read or written.
        """
        self.roofline: Roofline | None = None
        self._plan = plan
        self._environment = self._here = environment
        self._file = file
        self._contenders: dict[str, Contender] = {}
        self._rounds: dict[BenchCase, list[dict[str, RoundTimes]]] = {}
        self._is_begun = file is not None and file.exists() and file.stat().st_size > 0
        if file is not None and self._is_begun:
            self._read(file)

    def require_same_environment(self) -> None:
        """Refuse to add rounds to those that were measured elsewhere: figures of both mean nothing.

        Raises:
            RequestError: The machine or a package is another than the file says.
        """
        for name in sorted(self._environment.keys() | self._here.keys()):
            known, here = self._environment.get(name), self._here.get(name)
            if known != here and not any(part in name for part in _PASSING):
                raise RequestError(
                    f"{self._file} was measured with another {name}: {known} then, {here} here. Name "
                    "another file, or remove this one to begin anew"
                )

    def num_rounds(self, case: BenchCase) -> int:
        """Return how many rounds of a case are there."""
        return len(self._rounds.get(case, ()))

    def skipped(self, name: str) -> str | None:
        """Return why a contender takes no part any more, None if it does."""
        contender = self._contenders.get(name)
        return None if contender is None else contender.skipped

    def add_round(self, case: BenchCase, times: Mapping[str, RoundTimes]) -> None:
        """Keep a whole round: what every contender took, by name. Ctrl-C waits until it is kept."""
        with _uninterrupted():
            self._rounds.setdefault(case, []).append(dict(times))
            rounds = {name: dataclasses.asdict(x) for name, x in times.items()}
            self._append({"case": dataclasses.asdict(case), "round": rounds})

    def add_contender(self, contender: Contender) -> None:
        """Keep what is known of a contender; its peaks never shrink."""
        known = self._contenders.get(contender.name)
        merged = contender if known is None else _merged(known, contender)
        if merged != known:
            self._contenders[contender.name] = merged
            self._append({"contender": dataclasses.asdict(merged)})

    def skip(self, name: str, reason: str) -> None:
        """Note why a contender takes no part any more; its rounds so far stay."""
        known = self._contenders.get(name, Contender(name=name))
        self.add_contender(dataclasses.replace(known, skipped=reason))

    def add_roofline(self, roofline: Roofline) -> None:
        """Keep the roofline."""
        self.roofline = roofline
        self._append({"roofline": dataclasses.asdict(roofline)})

    def report(self) -> BenchReport:
        """Return everything so far."""
        names = [spec.name for spec in self._plan.specs()]
        cases = [case for case in self._plan.cases if case in self._rounds]
        measurements = [
            Measurement(contender=name, case=case, rounds=rounds)
            for case in cases
            for name in names
            if (rounds := tuple(x[name] for x in self._rounds[case] if name in x))
        ]
        return BenchReport(
            model=str(self._plan.model),
            contenders=tuple(self._contenders[x] for x in names if x in self._contenders),
            measurements=tuple(measurements),
            roofline=self.roofline,
            environment=self._environment,
        )

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        lines = [line]
        if not self._is_begun:
            head = {"format_version": _FORMAT_VERSION, "plan": self._plan.fingerprint()}
            lines = [{**head, "environment": dict(self._environment)}, line]
        with self._file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(x) + "\n" for x in lines))
        self._is_begun = True

    def _read(self, file: Path) -> None:
        raw = read_bytes(file, max_bytes=MAX_RECORD_BYTES, error=RequestError, remedy=_REMEDY)
        whole, _, rest = raw.rpartition(b"\n")
        lines = [
            parse_json(line, f"line {number} of {file}", error=RequestError, remedy=_REMEDY)
            for number, line in enumerate(whole.splitlines(), 1)
        ]
        try:
            version, plan = lines[0]["format_version"], lines[0]["plan"]
            environment = typed(Mapping[str, str], lines[0]["environment"], "environment")
        except (ValueError, LookupError) as err:
            raise RequestError(f"{file} is not the record of a benchmark: {_REMEDY}") from err
        if version != _FORMAT_VERSION:
            raise RequestError(
                f"{file} is a record of format {shortened(version)}, expected {_FORMAT_VERSION}: name "
                "another file"
            )
        self._require_same(file, plan)
        if rest:  # a line that was being written when the process was killed
            with file.open("r+b") as cut:
                cut.truncate(len(raw) - len(rest))
        self._environment = environment
        try:
            for line in lines[1:]:
                self._take(line)
        except ValueError as err:
            raise RequestError(f"{file} is damaged ({err}): {_REMEDY}") from err

    def _require_same(self, file: Path, plan: object) -> None:
        asked = self._plan.fingerprint()
        plan = plan if isinstance(plan, dict) else {}
        differing = [name for name in asked if plan.get(name) != asked[name]]
        if differing:
            name = differing[0]
            raise RequestError(
                f"{file} holds the rounds of another command: its {name} is {shortened(plan.get(name))}, this "
                f"one's {asked[name]}. Name another file, or remove this one to begin anew"
            )

    def _take(self, line: Mapping[str, Any]) -> None:
        if "round" in line:
            case: BenchCase = typed(BenchCase, line.get("case"), "case")
            times = typed(Mapping[str, RoundTimes], line["round"], "round")
            for x in times.values():
                _check_positive("the seconds of a round", x.ttft_s, sum(x.step_s), *x.step_s)
            self._rounds.setdefault(case, []).append(times)
        elif "roofline" in line:
            roofline: Roofline = typed(Roofline, line["roofline"], "roofline")
            rates = (roofline.read_bytes_per_s, roofline.matrix_flop_per_s)
            _check_positive("the rates of the roofline", *rates)
            self.roofline = roofline
        else:
            contender: Contender = typed(Contender, line.get("contender"), "contender")
            self._contenders[contender.name] = contender


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block, so that memory and file hold the same."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is None or threading.current_thread() is not threading.main_thread():
        yield  # nobody here is interrupted, or not by Python
        return
    has_come = False

    def wait(*_: object) -> None:
        nonlocal has_come
        has_come = True

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if has_come:
            signal.raise_signal(signal.SIGINT)


def _check_positive(name: str, *numbers: float) -> None:
    if not all(0 < x < float("inf") for x in numbers):
        raise ValueError(f"{name} are {shortened(numbers)}, expected to be above 0")


def _merged(known: Contender, new: Contender) -> Contender:
    return dataclasses.replace(
        new,
        description=new.description or known.description,
        load_s=known.load_s if new.load_s is None else new.load_s,
        peak_memory_bytes=larger(known.peak_memory_bytes, new.peak_memory_bytes),
        peak_anonymous_bytes=larger(known.peak_anonymous_bytes, new.peak_anonymous_bytes),
        peak_gpu_bytes=larger(known.peak_gpu_bytes, new.peak_gpu_bytes),
    )

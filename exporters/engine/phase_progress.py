"""A builder's nested phases as one number that grows from 0 to 1: `PhaseProgress`."""

import threading
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Phase:
    steps: int
    steps_done: int = 0
    children: list[str] = field(default_factory=list)


class PhaseProgress:
    """How far a build is, from what TensorRT's IProgressMonitor hears.

    A phase consists of steps, and a step may be a phase of its own. Builders report from several
    threads.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._roots: list[str] = []
        self._done = 0.0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> float:
        """Take note of a phase that starts; return the share of the build that is done."""
        with self._lock:
            if name not in self._phases:  # the name is all there is to tell two apart
                above = None if parent is None else self._phases.get(parent)
                (self._roots if above is None else above.children).append(name)
                self._phases[name] = _Phase(steps=max(1, steps))
            return self._update()

    def step(self, name: str, step: int) -> float:
        """Take note of a step that is done, counted from 0; return the share that is done."""
        with self._lock:
            if name in self._phases:
                phase = self._phases[name]
                phase.steps_done = min(phase.steps, step + 1)
            return self._update()

    def finish(self, name: str) -> float:
        """Take note of a phase that ends; return the share of the build that is done."""
        with self._lock:
            self._phases.pop(name, None)
            if self._roots == [name]:
                self._done = 1.0
            for siblings in (self._roots, *(phase.children for phase in self._phases.values())):
                if name in siblings:
                    siblings.remove(name)
            return self._update()

    def _update(self) -> float:
        # A phase that ends is counted by its parent's next step, a moment later: never go back.
        shares = [self._share(name) for name in self._roots]
        self._done = max([self._done, *shares])
        return self._done

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        running = max((self._share(child) for child in phase.children), default=0.0)
        return min(1.0, (phase.steps_done + running) / phase.steps)

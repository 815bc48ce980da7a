"""Measure the peak anonymous memory and the time of building a TensorRT for RTX engine.

A random bfloat16 checkpoint of the shape is written to a scratch folder, exported in float16 and built,
without a GPU. While the build's own process lives, its anonymous memory (RssAnon: what is no copy of a
file, and cannot be given up) is read every few milliseconds. The goal is under 1.2 times the plan's
size at the shape of Gemma 2B. Linux only. Scratch files are removed; they need up to 16 GB of disk at
that shape. Run it in the repository's root, `python -m benchmarks.build_memory`. The last line of stdout
is one JSON object.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import gemma_deploy
from benchmarks.shapes import SHAPES, shape_config, write_random_checkpoint
from gemma_deploy.engine_build import Layout

GOAL_RATIO = 1.2
_INTERVAL_S = 0.005


@dataclass(slots=True)
class Peak:
    """The most anonymous memory that child processes had.

    Attributes:
        bytes_by_stage: The peak while each stage of the build was going on.
        stage: The stage that is going on; None before the first.
    """

    bytes_by_stage: dict[str, int] = field(default_factory=dict)
    stage: str | None = None

    def sample(self) -> None:
        """Read the memory of every child process of this one."""
        if self.stage is None:
            return  # a child counts its parent's memory until it runs its own program
        now = sum(map(_anonymous_bytes, _children()))
        self.bytes_by_stage[self.stage] = max(now, self.bytes_by_stage.get(self.stage, 0))


@contextmanager
def sampled() -> Iterator[Peak]:
    """Read the memory of child processes until the block ends."""
    peak, is_over = Peak(), threading.Event()

    def watch() -> None:
        while not is_over.wait(_INTERVAL_S):
            peak.sample()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()


def measure(shape: str, layout: Layout, scratch: Path) -> dict[str, object]:
    """Build the shape's engine and return what it took."""
    checkpoint, bundle = scratch / "checkpoint", scratch / "bundle"
    checkpoint.mkdir()
    write_random_checkpoint(checkpoint, shape_config(shape))
    gemma_deploy.export(checkpoint, bundle, dtype="float16")
    started_s = time.perf_counter()
    with sampled() as peak:

        def on_progress(stage: str, _done: int, _total: int) -> None:
            peak.stage = stage

        options = gemma_deploy.BuildOptions(flavour="tensorrt-rtx", layout=layout)
        engine = gemma_deploy.build(bundle, options, on_progress=on_progress)
    wall_s = time.perf_counter() - started_s
    plan_bytes = max(record.size_bytes for record in engine.manifest.files.values())
    peak_bytes = max(peak.bytes_by_stage.values())
    return {
        "shape": shape,
        "layout": layout,
        "library": engine.manifest.build.library_version,
        "targets": engine.manifest.build.targets,
        "weights_bytes": (bundle / "weights.safetensors").stat().st_size,
        "plan_bytes": plan_bytes,
        "peak_anonymous_bytes": peak_bytes,
        "peak_by_stage": peak.bytes_by_stage,
        "ratio": peak_bytes / plan_bytes,
        "wall_s": wall_s,
    }


def _children() -> Iterator[int]:
    for path in Path("/proc/self/task").glob("*/children"):
        yield from map(int, path.read_text(encoding="ascii").split())


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended since
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(found[0]) if found else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="g2b")
    parser.add_argument("--layout", choices=get_args(Layout), default="one-engine")
    parser.add_argument("--folder", type=Path, help="where scratch files go (default: temporary)")
    return parser.parse_args()


def main() -> None:
    """Print a line of JSON; the exit code is 1 when the goal is missed."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="build-memory-") as scratch:
        reading = measure(arguments.shape, arguments.layout, Path(scratch))
    is_met = float(str(reading["ratio"])) < GOAL_RATIO
    print(json.dumps({"goal_ratio": GOAL_RATIO, "is_goal_met": is_met, **reading}))
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()

"""Measure the peak memory and the time of exporting a checkpoint, dense and rounded to each scheme.

A random bfloat16 checkpoint of the shape is written to a scratch folder and exported by a child
process for each format, whose peak resident memory (ru_maxrss, imports included) is read when it ends.
The goal is under 1.5 GB at the shape of Gemma 2B in every format. Peaks of float16 are bounded by
the weights (--no-calibration), since random weights have no text. Scratch files are removed; they need
up to 16 GB of disk at that shape. Run it in the repository's root, `python -m benchmarks.export_memory`.
The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from benchmarks.shapes import SHAPES, shape_config, write_random_checkpoint
from gemma_deploy.graph_spec import DType
from gemma_deploy.quantization.formats import SCHEMES

GOAL_BYTES = 1_500_000_000
FORMATS = (*get_args(DType), *SCHEMES)
_EXPORT = """
import sys
from pathlib import Path
from gemma_deploy.exporters.export import export_checkpoint
from gemma_deploy.exporters.quantization.options import QuantizationOptions
name = sys.argv[3]
options = None
if name in ("int4", "int8", "nf4", "fp8"):
    options = QuantizationOptions(scheme=name, method="rtn")
dtype = None if options else name
export_checkpoint(
    Path(sys.argv[1]), Path(sys.argv[2]), dtype=dtype, quantization=options, is_calibrated=False
)
"""
_IMPORT = "import gemma_deploy.exporters.export"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a child process took.

    Attributes:
        name: The dtype or scheme exported to, or `imports` for a child that only imports the exporter.
        peak_bytes: Its largest resident memory.
        wall_s: Its run time, start of Python included.
        bundle_bytes: Size of what it wrote.
    """

    name: str
    peak_bytes: int
    wall_s: float
    bundle_bytes: int


def measure(name: str, command: Sequence[str], output: Path | None = None) -> Reading:
    """Run a command to its end and read what it took.

    Raises:
        SystemExit: The command failed.
    """
    started_s = time.perf_counter()
    process = subprocess.Popen(command)  # noqa: S603 - this file's own command line
    # A child counts its parent's memory until it runs its own program; this process stays small.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the export ({name}) ended with exit code {process.returncode}")
    return Reading(
        name=name,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        wall_s=time.perf_counter() - started_s,
        bundle_bytes=sum(p.stat().st_size for p in output.iterdir()) if output else 0,
    )


def readings(shape: str, names: Sequence[str], scratch: Path) -> Iterator[Reading]:
    """Export the shape in each format, one bundle on the disk at a time."""
    checkpoint = scratch / "checkpoint"
    checkpoint.mkdir()
    write_random_checkpoint(checkpoint, shape_config(shape))
    yield measure("imports", [sys.executable, "-c", _IMPORT])
    for name in names:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            output = Path(folder) / "bundle"
            arguments = [str(checkpoint), str(output), name]
            yield measure(name, [sys.executable, "-c", _EXPORT, *arguments], output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="g270m")
    parser.add_argument("--format", choices=FORMATS, action="append", help="repeatable")
    parser.add_argument("--folder", type=Path, help="where scratch files go (default: temporary)")
    parser.add_argument("--json", action="store_true", help="print no table")
    return parser.parse_args()


def main() -> None:
    """Print a table and a line of JSON; the exit code is 1 when the goal is missed."""
    arguments = _arguments()
    results: list[Reading] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="export-memory-") as scratch:
        if not arguments.json:
            print(f"{arguments.shape:>10} {'peak MB':>8} {'time s':>7} {'bundle MB':>10}")
        for reading in readings(arguments.shape, arguments.format or FORMATS, Path(scratch)):
            results.append(reading)
            if not arguments.json:
                print(
                    f"{reading.name:>10} {reading.peak_bytes / 1e6:8.0f} {reading.wall_s:7.1f} "
                    f"{reading.bundle_bytes / 1e6:10.0f}",
                    flush=True,
                )
    is_met = all(reading.peak_bytes < GOAL_BYTES for reading in results)
    body = {"shape": arguments.shape, "goal_bytes": GOAL_BYTES, "is_goal_met": is_met}
    print(json.dumps(body | {"readings": [asdict(reading) for reading in results]}))
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()

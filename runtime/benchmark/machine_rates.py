"""What the machine can do at most, measured in a process of its own: `measure_rates`.

The process, `python -m gemma_deploy.runtime.benchmark.machine_rates`, reads a request from stdin and
writes the rates to stdout, one line of JSON each.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Final

from gemma_deploy.errors import SessionError
from gemma_deploy.quantization.formats import WeightFormat
from gemma_deploy.runtime.devices import Device

_MODULE: Final = "gemma_deploy.runtime.benchmark.machine_rates"
_TIMEOUT_S: Final = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """What was measured.

    Attributes:
        read_bytes_per_s: Read bandwidth of main memory, or copy bandwidth of a GPU's.
        matrix_flop_per_s: Rate of a large product: of a weight format on a CPU, of float16 on a GPU.
    """

    read_bytes_per_s: float
    matrix_flop_per_s: float


def measure_rates(weight_format: WeightFormat, device: Device, threads: int | None) -> MachineRates:
    """Measure, in about three seconds.

    Args:
        weight_format: What the weights of the product are in.
        device: `cpu`, or a GPU.
        threads: Threads of the kernels; None for one per core.

    Raises:
        SessionError: It could not be measured here: a package is missing, or the process failed.
    """
    request = {
        "weight_format": str(weight_format),
        "device": f"{device.kind}:{device.index}" if device.kind == "cuda" else "cpu",
        "threads": threads,
    }
    try:
        done = subprocess.run(  # noqa: S603 - our own module, run by our own interpreter
            # -P: files in the current folder must not pass for modules.
            [sys.executable, "-P", "-m", _MODULE],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        raise SessionError(
            f"the machine's own rates were not measured: it took over {_TIMEOUT_S} s"
        ) from err
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["(it said nothing)"]
        raise SessionError(
            f"the machine's own rates were not measured: the process ended with code "
            f"{done.returncode}: {said[-1]}"
        )
    return MachineRates(**json.loads(done.stdout))


def _measure(request: dict[str, Any]) -> dict[str, float]:
    device, threads = Device.parse(request["device"]), request["threads"]
    if device.kind == "cuda":
        from gemma_deploy.runtime.benchmark.cuda_rates import copy_bandwidth, half_matrix_rate

        read, matrix = copy_bandwidth(device.index), half_matrix_rate(device.index)
    else:
        from gemma_deploy.machine import usable_cores
        from gemma_deploy.runtime.benchmark.bandwidth import read_bandwidth
        from gemma_deploy.runtime.benchmark.matrix_rate import matrix_rate

        read = read_bandwidth(threads or usable_cores())
        matrix = matrix_rate(WeightFormat.parse(request["weight_format"]), threads)
    return {"read_bytes_per_s": read, "matrix_flop_per_s": matrix}


def main() -> None:
    """Serve one request."""
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # What libraries print must not end up in the answer.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    json.dump(_measure(json.loads(sys.stdin.readline())), answer)
    answer.close()


if __name__ == "__main__":
    main()

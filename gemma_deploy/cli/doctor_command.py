"""`gemma-deploy doctor`: what this machine can run."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import click

from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.cli.console import emit_json, emit_table, say

if TYPE_CHECKING:
    from gemma_deploy.capability import Capability
    from gemma_deploy.machine import Machine

_MARKS: Final[Mapping[bool | None, str]] = MappingProxyType(
    {True: "yes", False: "no ", None: "???"}
)


@click.command(
    "doctor",
    short_help="Tell what this machine can run and how to install what is missing.",
    epilog="""\b
Examples:
  gemma-deploy doctor
  gemma-deploy doctor gemma-2b
  gemma-deploy doctor --json | jq '.capabilities[] | select(.is_available)'
""",
)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, sizes in bytes.")
def command(*, folder: Path | None, as_json: bool) -> None:
    """Tell what this machine can run and how to install what is missing.

    With FOLDER, a bundle or a packed engine, also tell whether its TensorRT engines would load here.
    "???" marks what only a GPU and its driver could tell.

    An execution provider counts only if a session really gets it here: what onnxruntime was
    compiled with says nothing about this machine.

    The exit code is 0 if models run here, with ONNX Runtime or as TensorRT engines, or if engines can
    be built here; with a FOLDER that has engines, if one of them would load. Else it is 1. "???"
    counts as yes.
    """
    from gemma_deploy.doctor import capabilities, is_useful, warnings
    from gemma_deploy.doctor_tensorrt import engine_verdicts
    from gemma_deploy.machine import read_machine

    machine = read_machine()
    found, alerts = capabilities(machine), warnings(machine)
    engines = [] if folder is None else engine_verdicts(folder, machine)
    if as_json:
        judged = [dataclasses.asdict(capability) for capability in found]
        report = {"machine": dataclasses.asdict(machine), "capabilities": judged}
        report |= {"engines": [dataclasses.asdict(verdict) for verdict in engines]}
        emit_json(report | {"warnings": alerts}, indent=1)
    else:
        emit_table(_facts(machine), title="This machine")
        emit_table([(k, machine.packages[k]) for k in machine.packages], title="Packages")
        _print_verdicts("What it can run", found)
        if folder is not None:
            _print_verdicts(f"Whether the engines of {folder} would load", engines)
        for alert in alerts:
            say(f"Warning: {alert}", fg="yellow")
    loads = [verdict.is_available is not False for verdict in engines]
    if not (any(loads) if loads else is_useful(machine)):
        raise click.exceptions.Exit(1)


def _print_verdicts(title: str, verdicts: "Sequence[Capability]") -> None:
    say(title, bold=True)
    if not verdicts:
        say("  none")
    for verdict in verdicts:
        say(f"  {_MARKS[verdict.is_available]}  {verdict.name}: {verdict.detail}")
        if verdict.remedy:
            say(f"         -> {verdict.remedy}")


def _facts(machine: "Machine") -> list[tuple[str, str]]:
    memory = "unknown" if machine.memory_bytes is None else format_bytes(machine.memory_bytes)
    gpus = [
        f"{gpu.name}, {format_bytes(gpu.memory_bytes)}, compute capability "
        f"{gpu.compute_capability[0]}.{gpu.compute_capability[1]}"
        for gpu in machine.gpus
    ]
    return [
        ("system", f"{machine.system}, Python {machine.python}"),
        ("processor", f"{machine.cpu}, {machine.cores} cores"),
        ("instructions", " ".join(machine.cpu_features) or "unknown"),
        ("memory", memory),
        ("free disk", f"{format_bytes(machine.free_disk_bytes)} here"),
        ("CUDA driver", machine.cuda_driver or "none"),
        *[("GPU", gpu) for gpu in gpus or ["none"]],
        ("providers", f"working: {' '.join(machine.working_providers) or 'none'}"),
        ("", f"compiled in: {' '.join(machine.compiled_providers) or 'none'}"),
    ]

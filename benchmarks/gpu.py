"""Measure every backend that works on this machine's GPU against eager and compiled torch.

    python -m benchmarks.gpu                                  # random weights of the 2B shape
    python -m benchmarks.gpu --checkpoint ~/models/gemma-2b --prompt-tokens 256,4096 --batch-size 1,8

It has not run on hardware yet.

The checkpoint is exported in float16 and in bfloat16, engines are built where TensorRT is installed, and
`gemma-deploy bench` runs each in turn with torch-eager and torch-compile (static cache, mode
reduce-overhead) in the same dtype, round by round. ONNX Runtime runs float16 alone: it computes
bfloat16 bundles in float32. What cannot run is named with its reason. It writes
benchmarks/results/DATE-gpu-NAME.md and prints the goals for the 2B shape at batch 1: decode at least 3
times as fast as torch-eager, at least 1.1 times as fast as torch-compile, and at no less than 75 % of
the copy bandwidth.

Engines for H100 and H200 need TensorRT (`gemma-deploy[tensorrt]`); TensorRT for RTX has no target for
them. With --folder, bundles, engines and every round are kept there, and the same command goes on
where it was stopped. It needs 40 GB of disk, a GPU with 24 GB and a CUDA build of torch. The exit code
is 0 if all goals are met, 1 if one is missed, 2 if nothing was measured.
"""

import argparse
import contextlib
import datetime as dt
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.arguments import two_or_more, whole_number, whole_numbers
from benchmarks.gpu_results import GOALS, Run, goal_rows, markdown, overall
from benchmarks.random_tokenizer import write_tokenizer
from benchmarks.shapes import SHAPES, shape_config, write_random_checkpoint
from gemma_deploy.capability import Capability
from gemma_deploy.cli.console import column_lines
from gemma_deploy.doctor import capabilities
from gemma_deploy.machine import Machine, read_machine
from gemma_deploy.manifest import MANIFEST_FILE
from gemma_deploy.runtime.benchmark.environment import read_environment
from gemma_deploy.runtime.benchmark.results import BenchReport
from gemma_deploy.safetensors_files import SINGLE_FILE

BACKENDS = {
    "onnxruntime": ("ONNX Runtime on CUDA",),
    "tensorrt": ("building tensorrt engines", "running tensorrt engines"),
    "tensorrt-rtx": ("building tensorrt-rtx engines", "running tensorrt-rtx engines"),
}
"""What a machine must be capable of, as `gemma-deploy doctor` calls it."""
DTYPES = ("float16", "bfloat16")
NOTHING_MEASURED_EXIT_CODE = 2
_RESULTS = Path(__file__).with_name("results")
_SHOWN_LINES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is measured of each backend.

    Attributes:
        prompt_tokens: Lengths of prompts.
        new_tokens: Tokens to generate.
        batch_sizes: Rows at a time.
        rounds: Rounds that count.
        device: `cuda` or `cuda:N`.
    """

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    batch_sizes: tuple[int, ...]
    rounds: int
    device: str


def refusal(machine: Machine, backend: str, dtype: str) -> str | None:
    """Return why a backend cannot be measured in a dtype on a machine; None if it may be."""
    if (backend, dtype) == ("onnxruntime", "bfloat16"):
        return "ONNX Runtime computes bfloat16 bundles in float32"
    return _missing(capabilities(machine), BACKENDS[backend])


def _missing(found: Sequence[Capability], names: Sequence[str]) -> str | None:
    problems = [x for x in found if x.name in names and x.is_available is False]
    return _explained(problems[0]) if problems else None


def _explained(problem: Capability) -> str:
    remedy = f" ({problem.remedy})" if problem.remedy else ""
    return f"{problem.name}: {problem.detail}{remedy}"


def export_arguments(checkpoint: Path, bundle: Path, dtype: str) -> list[str]:
    """Return what `gemma-deploy` is given to export a bundle."""
    return ["export", str(checkpoint), "--output", str(bundle), "--dtype", dtype]


def build_arguments(bundle: Path, backend: str, sweep: Sweep) -> list[str]:
    """Return what `gemma-deploy` is given to build an engine just large enough for a sweep."""
    max_seq_len = max(sweep.prompt_tokens) + sweep.new_tokens
    limits = ["--max-seq-len", str(max_seq_len), "--max-batch", str(max(sweep.batch_sizes))]
    return ["build", str(bundle), "--backend", backend, *limits]


def bench_arguments(
    bundle: Path, checkpoint: Path, backend: str, dtype: str, sweep: Sweep
) -> list[str]:
    """Return what `gemma-deploy` is given to measure a backend; rounds are kept beside the bundle."""
    return [
        *("bench", str(bundle), "--backend", backend, "--device", sweep.device),
        *("--prompt-tokens", ",".join(map(str, sweep.prompt_tokens))),
        *("--new-tokens", str(sweep.new_tokens)),
        *("--batch-size", ",".join(map(str, sweep.batch_sizes))),
        *("--rounds", str(sweep.rounds)),
        *("--against", "torch-eager,torch-compile"),
        *("--checkpoint", str(checkpoint), "--baseline-dtype", dtype),
        *("--save", f"{bundle}-{backend}.jsonl", "--json"),
    ]


def gemma_deploy(arguments: Sequence[str]) -> tuple[str, str | None]:
    """Run the program; return its stdout, and the end of its stderr if it failed."""
    print(shlex.join(["gemma-deploy", *arguments]), file=sys.stderr, flush=True)
    command = [sys.executable, "-P", "-m", "gemma_deploy", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own program
    if done.returncode == 0:
        return done.stdout, None
    print(done.stderr, file=sys.stderr)
    lines = [line for line in done.stderr.splitlines() if line.strip()][-_SHOWN_LINES:]
    return done.stdout, f"`{arguments[0]}` ended with {done.returncode}: {' '.join(lines)}"


def measure(bundle: Path, checkpoint: Path, backend: str, dtype: str, sweep: Sweep) -> Run:
    """Export, build and measure as far as that is to be done still; a failure is a result, too."""
    steps = []
    if not (bundle / MANIFEST_FILE).is_file():
        steps.append(export_arguments(checkpoint, bundle, dtype))
    if backend.startswith("tensorrt"):
        steps.append(build_arguments(bundle, backend, sweep))
    steps.append(bench_arguments(bundle, checkpoint, backend, dtype, sweep))
    output = ""
    for arguments in steps:
        output, failure = gemma_deploy(arguments)
        if failure is not None:
            return Run(backend=backend, dtype=dtype, reason=failure)
    report = BenchReport.from_dict(json.loads(output.splitlines()[-1]))
    return Run(backend=backend, dtype=dtype, report=report)


def result_file(folder: Path, gpu: str, today: dt.date) -> Path:
    """Return where results of a GPU are kept."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / f"{today:%Y-%m-%d}-gpu-{name}.md"


def fail(message: str) -> NoReturn:
    """End the program: nothing was measured."""
    print(f"gpu: {message}", file=sys.stderr)
    raise SystemExit(NOTHING_MEASURED_EXIT_CODE)


@contextlib.contextmanager
def _work_folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="gemma-deploy-gpu-") as scratch:
        yield Path(scratch)


def _checkpoint(given: Path | None, shape: str, work: Path) -> Path:
    """Return the checkpoint to measure: the given one, or random weights of a shape."""
    if given is not None:
        return given
    folder = work / shape
    if not (folder / SINGLE_FILE).is_file():
        partial = work / f"{shape}-partial"
        partial.mkdir(exist_ok=True)
        config = shape_config(shape)
        write_tokenizer(partial, config.vocab_size)
        write_random_checkpoint(partial, config)
        partial.rename(folder)
    return folder


def measure_all(machine: Machine, args: argparse.Namespace, work: Path) -> list[Run]:
    """Measure each backend in each dtype."""
    sweep = Sweep(
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        batch_sizes=args.batch_size,
        rounds=args.rounds,
        device=args.device,
    )
    checkpoint = _checkpoint(args.checkpoint, args.shape, work)
    runs = []
    for dtype in args.dtype or DTYPES:
        for backend in args.backend or BACKENDS:
            reason = refusal(machine, backend, dtype)
            if reason is not None:
                runs.append(Run(backend=backend, dtype=dtype, reason=reason))
                continue
            runs.append(measure(work / dtype, checkpoint, backend, dtype, sweep))
    return runs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=SHAPES, default="g2b", help="random weights (g2b)")
    model.add_argument("--checkpoint", type=Path, help="real weights instead")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="repeatable (all)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable (both)")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (cuda)")
    parser.add_argument("--prompt-tokens", type=whole_numbers, default=(256, 2048), metavar="N,...")
    parser.add_argument("--new-tokens", type=two_or_more, default=128, metavar="N")
    parser.add_argument("--batch-size", type=whole_numbers, default=(1,), metavar="N,...")
    parser.add_argument("--rounds", type=whole_number, default=7, metavar="N")
    parser.add_argument("--folder", type=Path, help="where to keep bundles, engines and rounds")
    parser.add_argument("--output", type=Path, default=_RESULTS, help="where the results go")
    parser.add_argument("--name", help="for the results (the GPU's)")
    return parser.parse_args()


def main() -> None:
    """Measure, write the results and print the goals."""
    args = _arguments()
    machine = read_machine()
    problem = _missing(capabilities(machine), ("torch on CUDA",))
    if problem is not None:
        fail(f"the baselines need a GPU and a torch that can use it; {problem}")
    environment = read_environment(threads=None, device=args.device)
    if "GPU" not in environment:
        fail(f"there is no GPU {args.device} here; `gemma-deploy doctor` lists those there are")
    name = args.name or environment["GPU"].partition(",")[0]
    file = result_file(args.output, name, dt.datetime.now(dt.UTC).date())
    if not args.output.is_dir():
        fail(f"{args.output} is not a folder: make it, or give another --output")
    if file.exists():
        fail(f"{file} is there already: remove it, or give another --name")
    with _work_folder(args.folder) as work:
        runs = measure_all(machine, args, work)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    model = args.checkpoint or f"{args.shape}, random weights"
    text = markdown(f"{name}: {model}", command, environment, runs)
    file.write_text(text, encoding="utf-8")
    print("\n".join(column_lines(goal_rows(runs))))
    print(f"wrote {file}")
    if all(run.report is None for run in runs):
        raise SystemExit(NOTHING_MEASURED_EXIT_CODE)
    raise SystemExit(0 if all(overall(runs, goal) == "met" for goal in GOALS) else 1)


if __name__ == "__main__":
    main()

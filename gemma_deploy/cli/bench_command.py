"""`gemma-deploy bench`: speed and memory of a model, beside baselines on the same weights."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from gemma_deploy.cli.console import emit_json, notice, progress, warn
from gemma_deploy.cli.lazy_group import INTERRUPTED_EXIT_CODE
from gemma_deploy.cli.options import threads_option
from gemma_deploy.cli.outputs import check_output_file, write_output
from gemma_deploy.cli.prepacked_option import prepacked_cache_option

if TYPE_CHECKING:
    from gemma_deploy.runtime.benchmark.plan import BenchPlan
    from gemma_deploy.runtime.benchmark.record import BenchRecord
    from gemma_deploy.runtime.benchmark.results import BenchReport

    Callback = Callable[[click.Context, click.Parameter, str], tuple[int, ...]]

_BASELINES: Final = ("torch-eager", "torch-compile", "transformers")
_NOTHING: Final = "no round had been run to its end, so nothing was measured"


def _numbers(least: int) -> "Callback":
    """Return what reads whole numbers from a least one on, such as `32,256`."""

    def read(_ctx: click.Context, _param: click.Parameter, text: str) -> tuple[int, ...]:
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
            raise click.BadParameter(
                f"{text!r}; expected whole numbers from {least} on, separated by commas"
            )
        return tuple(int(part) for part in parts)

    return read


def _names(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[str, ...]:
    """Read names of baselines, such as `torch-eager,transformers`."""
    if text is None:
        return ()
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in _BASELINES:
            raise click.BadParameter(f"{name!r}; expected any of {', '.join(_BASELINES)}")
    return tuple(dict.fromkeys(names))


@click.command(
    "bench",
    short_help="Measure speed and memory, beside torch and transformers if asked to.",
    epilog="""\b
Examples:
  gemma-deploy bench gemma-2b
  gemma-deploy bench gemma-2b --prompt-tokens 32,256,1024 --batch-size 1,4 --threads 8
  gemma-deploy bench gemma-2b --against torch-eager,transformers --checkpoint ~/models/gemma-2b
  gemma-deploy bench gemma-2b --device cuda --rounds 10 --save a100.jsonl --report a100.html
  gemma-deploy bench gemma-2b --json | tail -n 1 | jq .decode_tokens_per_s

What the figures mean: prefill is prompt tokens per second until the first new token is there, decode
is new tokens per second after it, both of all rows of a batch together. Text is generated greedily by
the loop of `generate`, from random prompts, and ends of text are ignored. Medians over the rounds are
shown, with the smallest and the largest; ratios are taken within a round.

Every contender lives in a process of its own, is loaded once and waits while another one runs, so
close other programs and let a laptop run on mains. --save keeps each round as it ends: the same
command with the same file goes on where it stopped.
""",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompt-tokens",
    callback=_numbers(1),
    default="256",
    show_default=True,
    metavar="N,...",
    help="Lengths of the prompt. All combinations of the three lists are run.",
)
@click.option(
    "--new-tokens",
    callback=_numbers(2),
    default="64",
    show_default=True,
    metavar="N,...",
    help="Tokens to generate, the first included.",
)
@click.option(
    "--batch-size",
    callback=_numbers(1),
    default="1",
    show_default=True,
    metavar="N,...",
    help="Prompts that run at the same time.",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Rounds that count, for each combination.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Rounds before those that count.",
)
@click.option(
    "--against",
    callback=_names,
    metavar="NAME,...",
    help=f"Baselines to run in turn with it: any of {', '.join(_BASELINES)}.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="The checkpoint that BUNDLE was made of, which baselines run. [default: BUNDLE, if it is one]",
)
@click.option(
    "--baseline-dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="What baselines compute in. [default: the checkpoint's own]",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch"]),
    default="auto",
    show_default=True,
    help="As for `generate`.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="Where all run: cpu, cuda, cuda:N (N from 0), or auto: CUDA where it works.",
)
@threads_option
@prepacked_cache_option
@click.option(
    "--save",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep every round in FILE, and go on with those it holds.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.svg",
    help="Draw the rates.",
)
@click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Write a page with tables, drawings and the environment, in one file.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object, as the last line: every round, and prefill_tokens_per_s, "
    "decode_tokens_per_s, ttft_s and peak_memory_bytes of the first combination.",
)
def command(
    *,
    bundle: Path,
    prompt_tokens: tuple[int, ...],
    new_tokens: tuple[int, ...],
    batch_size: tuple[int, ...],
    against: tuple[Any, ...],
    checkpoint: Path | None,
    save: Path | None,
    plot: Path | None,
    report_file: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how fast the model in the folder BUNDLE is, and how much memory it takes.

    BUNDLE may also be a packed engine or a checkpoint. Shown are the speed of prefill and decode, the
    time to the first token, percentiles of a step's time, load time and peak memory; and how much of
    what the machine could do at most that is.
    """
    check_output_file("--plot", plot, ".svg")
    check_output_file("--report", report_file, ".html")
    check_output_file("--save", save)
    if checkpoint is not None and not against:
        raise click.UsageError("--checkpoint is what baselines run: name some with --against")
    from gemma_deploy.cli.bench_noise import busy_machine, wide_spreads
    from gemma_deploy.runtime.benchmark.baselines import measured_packages
    from gemma_deploy.runtime.benchmark.environment import read_environment
    from gemma_deploy.runtime.benchmark.plan import BenchPlan, open_source, sweep
    from gemma_deploy.runtime.benchmark.record import BenchRecord

    plan = BenchPlan(
        model=bundle,
        cases=sweep(prompt_tokens, new_tokens, batch_size),
        against=against,
        checkpoint=_checkpoint(bundle, checkpoint) if against else None,
        **options,
    )
    environment = read_environment(
        threads=plan.threads,
        device=plan.device,
        packages=measured_packages(plan, open_source(plan)),
    )
    record = BenchRecord(plan, environment, save)
    warn(busy_machine(record.report()))
    was_interrupted = _run(plan, record)
    report = record.report()
    if was_interrupted:
        then = "what was measured until then follows" if report.measurements else _NOTHING
        notice(f"Interrupted: {then}.")
    if report.measurements:
        _show(report, as_json=as_json)
        _write(report, plot, report_file)
        warn(*wide_spreads(report))
    if was_interrupted:
        raise click.exceptions.Exit(INTERRUPTED_EXIT_CODE)


def _checkpoint(bundle: Path, checkpoint: Path | None) -> Path:
    """Return the checkpoint that baselines run: of the same model, or the model itself."""
    from gemma_deploy.checkpoint import Checkpoint
    from gemma_deploy.checkpoint_files import require_checkpoint
    from gemma_deploy.cli.checks import require_same_model
    from gemma_deploy.runtime.source import ModelSource

    source = ModelSource.open(bundle)
    is_checkpoint = source.bundle is None and source.engine is None
    if checkpoint is None and not is_checkpoint:
        raise click.UsageError(
            "--against runs baselines on a checkpoint: give --checkpoint FOLDER, the one that "
            f"{bundle} was made of"
        )
    require_checkpoint(checkpoint or bundle)
    opened = Checkpoint.open(checkpoint or bundle)
    require_same_model(bundle, source.stored_config(), opened)
    return opened.folder


def _run(plan: "BenchPlan", record: "BenchRecord") -> bool:
    """Run what is missing; return whether Ctrl-C ended it."""
    from gemma_deploy.runtime.benchmark.sweep import run_sweep

    try:
        with progress() as on_progress:
            run_sweep(plan, record, on_progress=on_progress, on_notice=notice)
    except KeyboardInterrupt:
        return True
    return False


def _show(report: "BenchReport", *, as_json: bool) -> None:
    if as_json:
        emit_json(first_case(report) | report.to_dict())
        return
    from gemma_deploy.cli.bench_tables import print_report

    print_report(report)


def first_case(report: "BenchReport") -> dict[str, Any]:
    """Return the figures of ours in the first case, for programs that want no more."""
    measured, ours = report.measurements[0], report.contenders[0]
    return {
        "prefill_tokens_per_s": statistics.median(measured.prefill_rates()),
        "decode_tokens_per_s": statistics.median(measured.decode_rates()),
        "ttft_s": measured.ttft_s().median,
        "peak_memory_bytes": ours.peak_memory_bytes,
    }


def _write(report: "BenchReport", plot: Path | None, page: Path | None) -> None:
    contents = []
    if plot is not None:
        from gemma_deploy.cli.bench_plot import report_svg

        contents.append((plot, report_svg(report)))
    if page is not None:
        from gemma_deploy.cli.bench_report import report_html

        contents.append((page, report_html(report)))
    for path, text in contents:
        write_output(path, text)

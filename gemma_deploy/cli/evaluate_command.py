"""`gemma-deploy evaluate`: perplexity of a text, and the distance from the checkpoint."""

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.cli.console import emit_json, emit_table, progress, warn
from gemma_deploy.cli.options import threads_option
from gemma_deploy.cli.outputs import check_output_file, write_output
from gemma_deploy.text_files import read_text

if TYPE_CHECKING:
    from gemma_deploy.cli.evaluation import FinishedEvaluation


@click.command(
    "evaluate",
    short_help="Measure how well a model predicts a text, and how far it is from its checkpoint.",
    epilog="""\b
Examples:
  gemma-deploy evaluate gemma-2b --text held-out.txt
  gemma-deploy evaluate gemma-2b-int4 --text held-out.txt --reference ~/models/gemma-2b
  gemma-deploy evaluate gemma-2b-int4 --text held-out.txt --reference ~/models/gemma-2b --json
  gemma-deploy evaluate gemma-2b --text book.txt --max-tokens 20000 --plot perplexity.svg

The text may have any length: it is one document, read in windows of --context-tokens tokens, <bos>
first, each --stride tokens further than the one before. Each token is predicted once, in the first
window that holds it: by at least context - stride tokens before it, but at the text's beginning.
Memory grows by some bytes a token, whatever the vocabulary.

Perplexity is exp of the mean negative log-likelihood of the tokens: it compares models of the same
tokenizer only. KL is that of the next-token distributions, KL(reference || model) in nats: 0 where
both are equal.
""",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    metavar="FILE",
    help="UTF-8 text to read: one that the model was not calibrated on.",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="Also compare each prediction with this checkpoint's, run by torch in float32. Needs memory "
    "for the whole model in float32.",
)
@click.option(
    "--context-tokens",
    type=click.IntRange(min=2),
    metavar="N",
    help="Most tokens the model sees at a time, <bos> included. [default: 512, or the model's limit]",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens from one window to the next, up to --context-tokens: fewer give each token more to "
    "go by, and take longer. [default: half of the context]",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Read only the text's first N tokens. [default: all]",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch"]),
    default="auto",
    show_default=True,
    help="As for `generate`. An engine gives as many logits a step as it was built for: --max-logits.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="Where to run: cpu, cuda, cuda:N (N from 0), or auto: CUDA where it works.",
)
@threads_option
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write what was found along the text: a drawing of means (.svg), or every token (.csv).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all figures.")
def command(
    *,
    bundle: Path,
    text_file: Path,
    reference: Path | None,
    context_tokens: int | None,
    stride: int | None,
    max_tokens: int | None,
    backend: str,
    device: str,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Measure how well the model in the folder BUNDLE predicts a text.

    BUNDLE may also be a checkpoint or a packed engine. With --reference it is also measured how far
    the predictions are from those of the checkpoint that the bundle was made of: KL divergence, and
    how often both find the same token likeliest.
    """
    check_output_file("--plot", plot, ".svg", ".csv")
    from gemma_deploy.cli.evaluation import TextEvaluation

    evaluation = TextEvaluation(
        model=bundle,
        reference=reference,
        text=read_text(text_file),
        context_tokens=context_tokens,
        stride=stride,
        max_tokens=max_tokens,
        backend=backend,
        device=device,
        threads=threads,
    )
    with progress() as on_progress:
        finished = evaluation.run(on_progress)
    if as_json:
        emit_json(finished.to_dict())
    else:
        _print(finished, str(bundle))
    warn(finished.warning)
    if plot is not None:
        _write_plot(finished, plot, model=bundle, text_file=text_file, reference=reference)


def _print(finished: "FinishedEvaluation", title: str) -> None:
    found = finished.evaluator.result()
    rows = [
        ("tokens", f"{found.tokens:,} {_windows(finished)}"),
        ("perplexity", f"{found.perplexity:.4f}"),
    ]
    if found.kl_mean_nats is not None:
        rows += [
            ("of the reference", f"{found.reference_perplexity:.4f}"),
            ("KL, mean", f"{found.kl_mean_nats:.3g} nats"),
            ("KL, 99th percentile", f"{found.kl_p99_nats:.3g} nats"),
            ("KL, largest", f"{found.kl_max_nats:.3g} nats"),
            ("same likeliest token", f"{found.top1_agreement:.2%}"),
        ]
    emit_table(rows, title=title)


def _windows(finished: "FinishedEvaluation") -> str:
    return f"in windows of {finished.context_tokens}, by {finished.stride}"


def _write_plot(
    finished: "FinishedEvaluation",
    path: Path,
    *,
    model: Path,
    text_file: Path,
    reference: Path | None,
) -> None:
    from gemma_deploy.cli.evaluation_plot import position_csv, position_svg

    nll, kl = finished.evaluator.nll_nats, finished.evaluator.kl_nats
    if path.suffix == ".csv":
        content = position_csv(finished.token_ids, nll, kl)
    else:
        found = finished.evaluator.result()
        date = dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
        beside = f", beside {reference}" if reference is not None else ""
        read = f"{found.tokens:,} tokens of {text_file}, {_windows(finished)}"
        facts = [f"{read}: perplexity {found.perplexity:.4f}{beside}", date]
        content = position_svg(nll, kl, title=f"Evaluation of {model}", facts=facts)
    write_output(path, content)

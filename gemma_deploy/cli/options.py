"""Options that several verbs have, stated once."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def runtime_options(function: Function) -> Function:
    """Add --device, --threads and --max-seq-len: where and how a model is run."""
    decorators = (
        click.option(
            "--device",
            default="auto",
            show_default=True,
            metavar="DEVICE",
            help="Where to run: cpu, cuda, cuda:N (N from 0), or auto: CUDA where it works.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            metavar="N",
            help="Threads of the CPU kernels. [default: one per core]",
        ),
        click.option(
            "--max-seq-len",
            type=click.IntRange(min=1),
            metavar="TOKENS",
            help="Capacity of the KV cache: tokens of prompt and answer together. "
            "[default: what each prompt needs, up to the model's limit]",
        ),
        click.option(
            "--backend",
            type=click.Choice(["auto", "onnxruntime", "tensorrt", "tensorrt-rtx", "torch"]),
            default="auto",
            show_default=True,
            help="onnxruntime runs bundles, torch runs checkpoints, tensorrt and tensorrt-rtx run the "
            "engines that `gemma-deploy build` put into a bundle; auto takes onnxruntime, torch, or "
            "what a packed engine is for.",
        ),
    )
    return _decorated(function, decorators)


def sampling_options(function: Function) -> Function:
    """Add what decides how tokens are chosen and how many."""
    decorators = (
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=256,
            show_default=True,
            metavar="TOKENS",
            help="Most tokens to generate per prompt.",
        ),
        click.option(
            "--greedy",
            is_flag=True,
            help="Always take the likeliest token; what happens without any sampling option too.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            metavar="X",
            help="Sample, with logits divided by X: below 1 is safer, above 1 is wilder, 0 is "
            "greedy. [default: 1 with --top-k or --top-p]",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(min=1),
            metavar="K",
            help="Sample among the K likeliest tokens. [default: all]",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(min=0, max=1, min_open=True),
            metavar="P",
            help="Sample among the fewest tokens whose probabilities reach P. [default: all]",
        ),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(min=0, min_open=True),
            default=1.0,
            show_default=True,
            metavar="X",
            help="Make tokens that were there before less likely: above 1; 1 is no penalty.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            metavar="N",
            help="Start of the random numbers: the same seed gives the same text. "
            "[default: another one each time]",
        ),
    )
    return _decorated(function, decorators)


def generation_options(*, greedy: bool, **values: Any) -> Any:
    """Build the `GenerationOptions` that the sampling options mean.

    Raises:
        click.UsageError: --greedy together with an option that only sampling reads.
    """
    from gemma_deploy.runtime.request import GenerationOptions

    sampling = [name for name in ("temperature", "top_k", "top_p") if values[name] is not None]
    if greedy and sampling:
        names = ", ".join("--" + name.replace("_", "-") for name in sampling)
        raise click.UsageError(f"--greedy takes no {names}: leave one or the other out")
    return GenerationOptions(**values)


def _decorated(
    function: Function, decorators: tuple[Callable[[Function], Function], ...]
) -> Function:
    # click lists options in the order in which their decorators stand, the outermost first.
    for decorate in reversed(decorators):
        function = decorate(function)
    return function

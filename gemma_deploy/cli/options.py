"""Options that several verbs have, stated once."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])


def threads_option(function: Function) -> Function:
    """Add --threads; the command gets `threads: int | None`, no more than there are cores."""
    return click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        callback=lambda _context, _parameter, value: _usable_threads(value),
        help="Threads of the CPU kernels. More than there are cores become as many; more than 4 for "
        "each core are refused. [default: one per core]",
    )(function)


def _usable_threads(threads: int | None) -> int | None:
    if threads is None:
        return None
    from gemma_deploy.runtime.threads import usable_threads

    return usable_threads(threads)


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
        threads_option,
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
            "-n",
            "--max-new-tokens",
            type=click.IntRange(min=1),
            metavar="TOKENS",
            help="Most tokens to generate per prompt. [default: as the model's "
            "generation_config.json says, else 256]",
        ),
        click.option(
            "--greedy",
            is_flag=True,
            help="Always take the likeliest token, also where the model's generation_config.json says "
            "to sample. [default: as that file says, else greedy]",
        ),
        click.option(
            "--temperature",
            "--temp",
            type=click.FloatRange(min=0),
            metavar="X",
            help="Sample, with logits divided by X: below 1 is safer, above 1 is wilder, 0 is "
            "greedy; else from 0.0001 to 10000. [default: as generation_config.json says, else 1]",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(min=0),
            metavar="K",
            help="Sample among the K likeliest tokens, 0 for all. [default: as generation_config.json "
            "says; 50 if it says to sample and no more; else all]",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(min=0, max=1, min_open=True),
            metavar="P",
            help="Sample among the fewest tokens whose probabilities reach P, 1 for all. [default: as "
            "generation_config.json says, else all]",
        ),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(min=0, min_open=True),
            metavar="X",
            help="Make tokens that were there before less likely: above 1; 1 is no penalty. [default: as "
            "generation_config.json says, else 1]",
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
    """Build the `GenerationOptions` that the sampling options mean; --greedy is a choice, too.

    Raises:
        click.UsageError: --greedy together with an option that only sampling reads.
    """
    from gemma_deploy.runtime.request import GenerationOptions

    sampling = [name for name in ("temperature", "top_k", "top_p") if values[name] is not None]
    if greedy and sampling:
        names = ", ".join("--" + name.replace("_", "-") for name in sampling)
        raise click.UsageError(f"--greedy takes no {names}: leave one or the other out")
    return GenerationOptions(**(values | {"temperature": 0.0} if greedy else values))


def _decorated(
    function: Function, decorators: tuple[Callable[[Function], Function], ...]
) -> Function:
    # click lists options in the order in which their decorators stand, the outermost first.
    for decorate in reversed(decorators):
        function = decorate(function)
    return function

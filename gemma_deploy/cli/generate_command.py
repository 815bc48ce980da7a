"""`gemma-deploy generate`: prompts in, continuations out."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gemma_deploy.cli.console import emit_json, notice, say, speak
from gemma_deploy.cli.interrupt import cancel_on_interrupt
from gemma_deploy.cli.lazy_group import INTERRUPTED_EXIT_CODE
from gemma_deploy.cli.loading import load_model, tell_sampling
from gemma_deploy.cli.options import generation_options, runtime_options, sampling_options
from gemma_deploy.cli.prepacked_option import prepacked_cache_option
from gemma_deploy.cli.prompts import argument_text, read_prompts
from gemma_deploy.cli.reading import reading_progress

if TYPE_CHECKING:
    from gemma_deploy.runtime.request import GenerationOptions
    from gemma_deploy.runtime.result import GenerationResult
    from gemma_deploy.runtime.streaming import TextStream
    from gemma_deploy.runtime.text_generator import TextGenerator

    Output = TextStream | GenerationResult

_HEADER_CHARACTERS = 72


@click.command(
    "generate",
    short_help="Continue one prompt or many.",
    epilog="""\b
Examples:
  gemma-deploy generate gemma-2b "The for statement is used to"
  gemma-deploy generate gemma-2b-it --chat "Why is the sky blue?" --temperature 0.7 --seed 1
  gemma-deploy generate gemma-2b --file prompts.txt --batch-size 4 --json > results.jsonl
  git diff | gemma-deploy generate gemma-2b-it --chat --max-new-tokens 60
  gemma-deploy generate CHECKPOINT --backend torch "The for statement is used to"
  gemma-deploy generate gemma-2b --backend tensorrt-rtx "The for statement is used to"

Only the continuation is printed, not the prompt. How tokens are chosen, and how many, is what the
options say, else what the model's generation_config.json says, else greedy and 256; a field of that
file that is not implemented is named in a warning. Ctrl-C stops after the current token, keeps what
was generated and exits with 130; a second Ctrl-C stops at once.

A float16 bundle that works with --device cpu may still overflow on CUDA: ONNX Runtime's CPU
multiplies matrices in float32.
""",
)
@click.argument("bundle", type=click.Path())
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--file",
    metavar="FILE",
    help="Read prompts from FILE (UTF-8; - is stdin): one per line, empty lines skipped. A .jsonl "
    'file holds {"prompt": "..."} in each line, for prompts of several lines.',
)
@click.option(
    "--no-special-tokens",
    is_flag=True,
    help="Read control tokens that a prompt spells (<end_of_turn>, <bos>) as plain text: for prompts "
    "that hold other people's words. With --chat that is always so.",
)
@click.option(
    "--prompt-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Take the whole of FILE (UTF-8) as one prompt.",
)
@sampling_options
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template.")
@click.option("--system", metavar="TEXT", help="System prompt for --chat.")
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="ROWS",
    help="Most prompts that run at a time; changes speed and memory, and the text by rounding only. With --chat "
    "prompts run one at a time.",
)
@runtime_options
@prepacked_cache_option
@click.option("--no-stream", is_flag=True, help="Print a single prompt's text when it is complete.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object per prompt and line: prompt, text, prompt_token_ids, token_ids, "
    "finish_reason (stop, length or cancelled), timings (seconds, tokens per second).",
)
def command(
    *,
    bundle: str,
    prompts: tuple[str, ...],
    file: str | None,
    prompt_file: Path | None,
    no_special_tokens: bool,
    chat: bool,
    system: str | None,
    batch_size: int,
    device: str,
    threads: int | None,
    max_seq_len: int | None,
    backend: str,
    prepacked_cache: Path | None,
    no_stream: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue each PROMPT with the model in the folder BUNDLE.

    Prompts come as arguments, from --file, or from --prompt-file or stdin, which are one prompt as a
    whole. A single prompt's text is streamed while it is generated; several are printed under headers, in their
    order.
    """
    if system is not None and not chat:
        raise click.UsageError("--system is for chat templates: give --chat too")
    options = generation_options(**sampling)
    texts = read_prompts(prompts, file, prompt_file)
    if system is not None:
        system = argument_text(system, "--system")
    generator = load_model(
        bundle,
        backend=backend,
        device=device,
        max_seq_len=max_seq_len,
        threads=threads,
        prepacked_cache=prepacked_cache,
    )
    tell_sampling(generator, options)
    started = time.perf_counter()
    with generator, cancel_on_interrupt() as is_cancelled, reading_progress() as on_progress:
        running: dict[str, Any] = {"is_cancelled": is_cancelled, "on_progress": on_progress}
        outputs: Iterator[Output]
        if chat:
            outputs = _answers(generator, texts, system, options, running)
        elif len(texts) == 1:
            stream = generator.stream(
                texts[0], options, allow_special=not no_special_tokens, **running
            )
            outputs = iter([stream])
        else:
            outputs = generator.generate_each(
                texts,
                options,
                batch_size=batch_size,
                allow_special=not no_special_tokens,
                **running,
            )
        results = _print(outputs, texts, is_streamed=not (as_json or no_stream), as_json=as_json)
    _summarize(results, time.perf_counter() - started)
    if any(result.finish_reason == "cancelled" for result in results):
        raise click.exceptions.Exit(INTERRUPTED_EXIT_CODE)


def _answers(
    generator: "TextGenerator",
    texts: Sequence[str],
    system: str | None,
    options: "GenerationOptions",
    running: Mapping[str, Any],
) -> Iterator["Output"]:
    """Yield a stream for each prompt, in a chat of its own."""
    before = [] if system is None else [{"role": "system", "content": system}]
    for text in texts:
        messages = [*before, {"role": "user", "content": text}]
        yield generator.chat(messages, options, **running)


def _print(
    outputs: Iterator["Output"], texts: Sequence[str], *, is_streamed: bool, as_json: bool
) -> list["GenerationResult"]:
    """Print each output as soon as it is there; return the results."""
    results = []
    for number, (text, output) in enumerate(zip(texts, outputs, strict=True), 1):
        if len(texts) > 1 and not as_json:
            say(f"[{number}/{len(texts)}] {_shortened(text)}", bold=True)
        result = _finish(output, on_piece=_print_piece if is_streamed else _keep_silent)
        if as_json:
            emit_json(result.to_dict())
        else:
            was_printed = is_streamed and result is not output
            speak("" if was_printed else result.text, ends_line=True)
        results.append(result)
    return results


def _finish(output: "Output", *, on_piece: Callable[[str], object]) -> "GenerationResult":
    """Run an output to its end, if it is still to be run."""
    from gemma_deploy.runtime.result import GenerationResult

    if isinstance(output, GenerationResult):
        return output
    with output:
        for piece in output:
            on_piece(piece)
    return output.result


def _print_piece(piece: str) -> None:
    speak(piece)


def _keep_silent(_piece: str) -> None:
    """Let a piece pass: the whole text is printed at its end."""


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _HEADER_CHARACTERS else line[: _HEADER_CHARACTERS - 3] + "..."


def summary(result: "GenerationResult") -> str:
    """Return how a generation ended, its length and its speed, as one line."""
    timings = result.timings
    if result.finish_reason == "cancelled" and timings.ttft_s is None:
        after = f" after {timings.total_s:.2f} s" if timings.total_s else ""
        return f"interrupted{after}, before the first token ({timings.prompt_tokens} prompt tokens)"
    ends = {"stop": "complete", "length": "stopped at the limit", "cancelled": "interrupted"}
    parts = [
        f"{ends[result.finish_reason]}: {timings.new_tokens} tokens in {timings.total_s:.2f} s"
    ]
    if timings.ttft_s is not None:
        parts.append(f"first after {timings.ttft_s:.3f} s ({timings.prompt_tokens} prompt tokens)")
    if timings.decode_tokens_per_s is not None:
        parts.append(f"then {timings.decode_tokens_per_s:.1f} tokens/s")
    return ", ".join(parts)


def _summarize(results: Sequence["GenerationResult"], seconds: float) -> None:
    if len(results) == 1:
        notice(summary(results[0]))
        return
    tokens = sum(result.timings.new_tokens for result in results)
    cut = sum(result.finish_reason == "cancelled" for result in results)
    interrupted = f", {cut} of them interrupted" if cut else ""
    notice(
        f"{len(results)} prompts{interrupted}: {tokens} tokens in {seconds:.2f} s, "
        f"{tokens / seconds:.1f} tokens/s"
    )

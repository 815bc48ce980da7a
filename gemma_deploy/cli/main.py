"""The `gemma-deploy` program: its verbs, listed without importing them."""

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Final, NoReturn

import click

from gemma_deploy.cli.console import VisibleFormatter, say
from gemma_deploy.cli.lazy_group import LazyCommand, LazyGroup

COMMANDS: Final = MappingProxyType(
    {
        "export": LazyCommand(
            module="gemma_deploy.cli.export_command",
            short_help="Turn a Gemma checkpoint into a bundle of ONNX graphs and weights.",
        ),
        "build": LazyCommand(
            module="gemma_deploy.cli.build_command",
            short_help="Build a TensorRT engine of a bundle.",
        ),
        "pack": LazyCommand(
            module="gemma_deploy.cli.pack_command",
            short_help="Copy an engine, with all it needs to generate, into a folder to ship.",
        ),
        "generate": LazyCommand(
            module="gemma_deploy.cli.generate_command",
            short_help="Continue one prompt or many.",
        ),
        "chat": LazyCommand(
            module="gemma_deploy.cli.chat_command",
            short_help="Talk to a model in the terminal.",
        ),
        "inspect": LazyCommand(
            module="gemma_deploy.cli.inspect_command",
            short_help="Show what a bundle, checkpoint or engine holds and the memory it needs.",
        ),
        "verify": LazyCommand(
            module="gemma_deploy.cli.verify_command",
            short_help="Check a bundle: files, graphs, and agreement with its checkpoint.",
        ),
        "evaluate": LazyCommand(
            module="gemma_deploy.cli.evaluate_command",
            short_help="Measure how well a model predicts a text, and how far it is from its checkpoint.",
        ),
        "bench": LazyCommand(
            module="gemma_deploy.cli.bench_command",
            short_help="Measure speed and memory, beside torch and transformers if asked to.",
        ),
        "cache": LazyCommand(
            module="gemma_deploy.cli.cache_command",
            short_help="List or remove the prepacked weights that --prepacked-cache keeps.",
        ),
        "doctor": LazyCommand(
            module="gemma_deploy.cli.doctor_command",
            short_help="Tell what this machine can run and how to install what is missing.",
        ),
    }
)

EPILOG: Final = """\b
Examples:
  gemma-deploy export google/gemma-2b --output gemma-2b --fp16
  gemma-deploy generate gemma-2b "The for statement is used to"
  gemma-deploy COMMAND --help

Results go to stdout, progress and messages to stderr. Exit codes: 0 success; 2 what was typed
cannot be (an unknown option or value, a path that is not there or not what the verb takes, an
output that exists); 1 it can be, and failed (damaged files, the network, a package, a device or
memory that is missing, a check that did not pass); 130 interrupted with Ctrl-C.
"""


@click.group(
    cls=LazyGroup,
    lazy_commands=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)
@click.option(
    "--debug",
    is_flag=True,
    envvar="GEMMA_DEPLOY_DEBUG",
    help="Show the whole traceback of an error. [env: GEMMA_DEPLOY_DEBUG]",
)
@click.version_option(package_name="gemma-deploy", message="%(prog)s %(version)s")
def cli(*, debug: bool) -> None:
    """Put Gemma models into production: from a checkpoint to streamed text."""
    del debug  # read by LazyGroup


def main() -> None:
    """Run the program on this process's arguments; never returns."""
    _open_missing_streams()
    _unwind_on_termination()
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end a generation half way.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(VisibleFormatter())
    with _flushed_stdout():
        cli.main(prog_name="gemma-deploy")


def _open_missing_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) empty ones."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process


def _unwind_on_termination() -> None:
    """Let SIGTERM and SIGHUP unwind the stack, so that an export takes its partial folder along."""

    def unwind(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, unwind)


@contextlib.contextmanager
def _flushed_stdout() -> Iterator[None]:
    """Write out what stdout holds: silently if its reader went away, as in `... | head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as err:
        # The interpreter flushes once more on its way out; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(err, BrokenPipeError):
            say(f"Error: the output cannot be written: {err.strerror}", err=True)
        sys.exit(1)

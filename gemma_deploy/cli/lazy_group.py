"""A click group that imports a verb's module only when that verb is run."""

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import click

from gemma_deploy.cli.console import say, warnings_as_notices
from gemma_deploy.cli.visible import visible
from gemma_deploy.errors import GemmaDeployError
from gemma_deploy.install_hint import explain_missing_package, missing_package

# What a shell reports for a program that Ctrl-C ended: 128 + SIGINT.
INTERRUPTED_EXIT_CODE: Final = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyCommand:
    """Where a verb lives and what the overview says of it.

    Attributes:
        module: Module that defines the command as `command`.
        short_help: Its line in the group's help, known without importing the module.
    """

    module: str
    short_help: str


class CommandError(click.ClickException):
    """An error as click shows it: `Error: message` on stderr, and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(visible(message))
        self.exit_code = exit_code  # type: ignore[misc] # click reads the instance's own


def explain_os_error(err: OSError) -> str:
    """Return what the operating system refused, and what to do about it."""
    reason = err.strerror or str(err)
    if err.filename is None:
        return f"the operating system refused an operation: {reason}"
    return (
        f"{err.filename} cannot be used: {reason}; check the path and that this user may read it "
        "and its folders"
    )


class LazyGroup(click.Group):
    """A group of verbs in a table of names, imported when asked for.

    It is also where errors raised on purpose, the operating system's and packages that are not
    installed turn into messages: everything below it runs inside `invoke`, whether a process or a test runner started it.
    """

    def __init__(self, *args: Any, lazy_commands: Mapping[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lazy_commands = lazy_commands

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the verbs in the order of the table: the order in which they are used."""
        return list(self._lazy_commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import a verb's module and return its command; None for an unknown name."""
        lazy = self._lazy_commands.get(cmd_name)
        if lazy is None:
            return None
        command: click.Command = importlib.import_module(lazy.module).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; an unknown one is answered with the names it resembles."""
        if args and not args[0].startswith("-") and args[0] not in self._lazy_commands:
            close = difflib.get_close_matches(args[0], self._lazy_commands)
            hint = f"did you mean {' or '.join(close)}?" if close else "see `gemma-deploy --help`"
            ctx.fail(f"No such command {args[0]!r}: {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """Write the overview from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(k, v.short_help) for k, v in self._lazy_commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; errors become a message, unless `--debug` wants the traceback."""
        try:
            with warnings_as_notices():
                return super().invoke(ctx)
        except GemmaDeployError as err:
            if ctx.params.get("debug"):
                raise
            raise CommandError(str(err), err.exit_code) from err
        except ModuleNotFoundError as err:
            package = missing_package(err)
            if package is None or ctx.params.get("debug"):
                raise
            text = explain_missing_package(package, ctx.invoked_subcommand)
            raise CommandError(text, GemmaDeployError.exit_code) from err
        except click.ClickException as err:
            err.message = visible(err.message)  # type: ignore[misc] # it may quote files
            raise
        except BrokenPipeError:
            raise  # whoever read the output went away: click ends quietly
        except OSError as err:
            if ctx.params.get("debug"):
                raise
            raise CommandError(explain_os_error(err), GemmaDeployError.exit_code) from err
        except KeyboardInterrupt:
            say("\nInterrupted.", err=True)
            raise click.exceptions.Exit(INTERRUPTED_EXIT_CODE) from None

"""Where ONNX Runtime's packed weights are kept: `--prepacked-cache`."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])

AUTO: Final = "auto"
OFF: Final = "off"
ENVIRONMENT_VARIABLE: Final = "GEMMA_DEPLOY_PREPACKED_CACHE"


def prepacked_cache_option(function: Function) -> Function:
    """Add --prepacked-cache; the command gets `prepacked_cache: Path | None`."""
    return click.option(
        "--prepacked-cache",
        metavar="DIR|auto|off",
        default=OFF,
        show_default=True,
        envvar=ENVIRONMENT_VARIABLE,
        show_envvar=True,
        callback=lambda _context, _parameter, value: cache_folder(value),
        help="Keep a bundle's weights in DIR as this CPU multiplies them: the first load writes them "
        "(2 to 3 times the size of the bundle's weights, 5 times if they have 16 bits), later ones "
        "are quick and processes share them. auto is the user's cache folder; see `gemma-deploy cache`.",
    )(function)


def cache_folder(value: str) -> Path | None:
    """Return the folder that a value of the option means; None for `off`."""
    if value == OFF:
        return None
    return default_cache_folder(os.environ, sys.platform) if value == AUTO else Path(value)


def default_cache_folder(environment: Mapping[str, str], platform: str) -> Path:
    """Return the user's folder for prepacked weights, by the platform's convention.

    Args:
        environment: The process's environment variables.
        platform: As `sys.platform`.
    """
    if platform == "win32":
        local = environment.get("LOCALAPPDATA")
        base = Path(local) if local else Path.home() / "AppData" / "Local"
    elif platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        given = Path(environment.get("XDG_CACHE_HOME", ""))
        # The XDG Base Directory Specification: relative paths are invalid and to be ignored.
        base = given if given.is_absolute() else Path.home() / ".cache"
    return base / "gemma-deploy" / "prepacked"

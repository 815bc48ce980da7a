"""How gemma-deploy is installed with what is missing: `install_line`, `explain_missing_package`."""

import importlib.util
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from urllib.request import url2pathname

_PACKAGE = "gemma-deploy"
# The verbs of the machine where engines are made; a device that only runs them has fewer packages.
_MAKING_VERBS: Final = ("export", "build", "verify")


def install_line(extra: str | None = None, *options: str) -> str:
    """Return the command that installs gemma-deploy, as an error or a report words it.

    It installs from the clone: no package index has gemma-deploy. Where this installation came from
    a clone that is still there, the command names it and works anywhere.

    Args:
        extra: The extra that is missing; None for none.
        *options: For pip, such as `--upgrade`.

    Returns:
        The command, and where to run it unless that does not matter.
    """
    clone, is_editable = _clone()
    target = f"{clone or '.'}[{extra}]" if extra else str(clone or ".")
    quoted = f'"{target}"' if extra or " " in target else target
    command = " ".join(["pip install", *options, *(["--editable"] if is_editable else []), quoted])
    return command if clone else f"{command} in a clone of gemma-deploy"


def missing_package(err: ModuleNotFoundError) -> str | None:
    """Return the package whose absence an import failed for; None if it failed for another reason.

    A module that is missing from this program, from Python itself or from a package that is there is
    a bug or a broken installation, and the traceback tells where.
    """
    package = (err.name or "").partition(".")[0]
    if package in ("", "gemma_deploy") or package in sys.stdlib_module_names:
        return None
    return package if importlib.util.find_spec(package) is None else None


def explain_missing_package(package: str, verb: str | None) -> str:
    """Return that a verb needs a package, and how to install it."""
    text = f"this needs the Python package {package}, which is not installed: pip install {package}"
    if verb in _MAKING_VERBS:
        text += f". All that {verb} needs: {install_line()}"
    return text


def _clone() -> tuple[Path | None, bool]:
    """Return the folder that pip installed from, if it is there, and whether it is in use itself.

    Source: https://packaging.python.org/en/latest/specifications/direct-url/
    """
    try:
        text = metadata.distribution(_PACKAGE).read_text("direct_url.json")
        stated = json.loads(text or "{}")
        url = urlsplit(str(stated.get("url", "")))
        is_editable = bool(stated.get("dir_info", {}).get("editable"))
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return None, False
    folder = Path(url2pathname(url.path))
    if url.scheme != "file" or not (folder / "pyproject.toml").is_file():
        return None, False
    return folder, is_editable

"""How gemma-deploy is installed with what is missing: `install_line`."""

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

_PACKAGE = "gemma-deploy"


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

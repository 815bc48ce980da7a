"""Paths as people write them: `user_path`."""

from pathlib import Path

from gemma_deploy.errors import RequestError


def user_path(given: str | Path) -> Path:
    """Return a path with `~` and `~NAME` replaced by home folders.

    Raises:
        RequestError: Nobody here has that name.
    """
    try:
        return Path(given).expanduser()
    except RuntimeError as err:
        raise RequestError(f"{given} cannot be found: {err}") from err

"""Checkpoints from a model hub: downloads the files that an export needs, no others.

The endpoint, the token and the cache folder are huggingface_hub's own settings (HF_ENDPOINT,
HF_TOKEN or `hf auth login`, HF_HOME): a file that transformers has already fetched is not fetched
again. Protocol: https://huggingface.co/docs/hub/api
"""

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from gemma_deploy.checkpoint_files import ADAPTER_FILE, LICENCE_PATTERNS, explain_folder
from gemma_deploy.errors import HubError, RequestError
from gemma_deploy.install_hint import install_line
from gemma_deploy.user_paths import user_path

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

# Weights, what describes them, and the tokenizer; `download` adds the licences. Never pickle or GGUF.
WANTED_FILES: Final = (
    "config.json",
    ADAPTER_FILE,
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# A pattern's `*` also matches `/`; and some repositories hold the weights twice.
UNWANTED_FILES: Final = ("*/*", "consolidated*.safetensors", "adapter_model*.safetensors")

_STORAGE_ERRNOS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_REPO_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_hub_id(source: str) -> bool:
    """Tell whether a text has the form of a hub's model name, `organization/name`."""
    return _REPO_ID.fullmatch(source) is not None


def resolve_checkpoint(source: str, *, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint, downloading it if `source` names a model on the hub.

    Args:
        source: A folder, or a hub id such as `google/gemma-2b`. A folder that exists wins.
        revision: Branch, tag or commit of a hub id; None for its main branch.

    Raises:
        RequestError: A revision of a folder; or what is at `source` is no checkpoint, and nothing
            a hub could have (see `explain_folder`).
        HubError: See `download`.
    """
    folder = user_path(source)
    if is_hub_id(source) and not os.path.lexists(folder):
        return download(source, revision=revision)
    wrong = explain_folder(folder)
    if wrong is not None:
        other = "" if os.path.lexists(folder) else ", or a model on the hub such as google/gemma-2b"
        raise RequestError(wrong + other)
    if revision is not None:
        raise RequestError(
            f"revision {revision!r} was given, but {source} is a folder on this machine: "
            "leave the revision out, or run where no such folder exists"
        )
    return folder


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    cache_folder: Path | None = None,
    token: str | bool | None = None,
) -> Path:
    """Download what an export needs of a model and return the folder that holds it.

    Args:
        repo_id: `organization/name`.
        revision: Branch, tag or commit; None for the main branch.
        endpoint: The hub's address; None for huggingface_hub's setting.
        cache_folder: Where files are kept; None for huggingface_hub's setting.
        token: Access token; None for huggingface_hub's setting, False for none at all.

    Returns:
        The snapshot folder inside the cache: files there are shared, never write to them.

    Raises:
        HubError: huggingface_hub is missing, the hub cannot be reached, there is no such model or
            revision, access is refused, or the model has no safetensors.
    """
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as err:
        raise HubError(
            f"no folder {repo_id} exists here, and downloading a model of that name needs "
            f"huggingface_hub, which is not installed: {install_line('hub')}"
        ) from err

    # The bases hold the HTTP library's own root error, whichever library this version uses.
    http_failures = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    # UnicodeDecodeError: a file of its cache is damaged.
    failures: tuple[type[Exception], ...] = (
        OSError,
        UnicodeDecodeError,
        HFValidationError,
        *http_failures,
    )
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            endpoint=endpoint,
            cache_dir=cache_folder,
            token=token,
            allow_patterns=[*WANTED_FILES, *map(_in_any_case, LICENCE_PATTERNS)],
            ignore_patterns=list(UNWANTED_FILES),
            library_name="gemma-deploy",
        )
    except failures as err:
        address = endpoint or constants.ENDPOINT
        raise HubError(_explain(err, repo_id, revision, address)) from err
    return _checked(Path(folder), repo_id)


def _in_any_case(pattern: str) -> str:
    """Return a pattern in lower case so that it matches any case: `[ab]c*` becomes `[abAB][cC]*`.

    huggingface_hub tells case apart. Listing the repository's files first would ask the hub once
    more, and a model that is in the cache could not be exported offline.
    """
    return re.sub(
        r"\[(?P<set>[a-z]+)\]|(?P<letter>[a-z])",
        lambda m: f"[{m['set'] or m['letter']}{(m['set'] or m['letter']).upper()}]",
        pattern,
    )


def _checked(folder: Path, repo_id: str) -> Path:
    if not any(folder.glob("*.safetensors")):
        raise HubError(
            f"{repo_id} has no *.safetensors weights, and other formats are not read (pickle runs "
            "arbitrary code, GGUF is quantized): choose the model's safetensors version"
        )
    return folder


def _explain(err: BaseException, repo_id: str, revision: str | None, endpoint: str) -> str:
    """Return what a failed download means and what to do about it."""
    from huggingface_hub import errors

    if isinstance(err, errors.HfHubHTTPError):
        return _explain_refusal(err, repo_id, revision, endpoint)
    if isinstance(err, errors.HFValidationError):
        return f"{repo_id!r} is not a name that a hub can have: {err}"
    cause = _root(err)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return (
            f"{repo_id} is not complete in the local cache and HF_HUB_OFFLINE forbids downloads: "
            "unset it, or give the folder of a checkpoint"
        )
    if isinstance(cause, OSError) and (cause.filename or cause.errno in _STORAGE_ERRNOS):
        place = cause.filename or "huggingface_hub's cache folder"
        return f"{repo_id} cannot be stored in {place}: {cause.strerror}; set HF_HOME to move it"
    return (
        f"{repo_id} cannot be downloaded from {endpoint}: {str(cause) or type(cause).__name__}. "
        "There is no folder of that name here either; check the network and HF_ENDPOINT, or give "
        "the folder of a checkpoint"
    )


def _explain_refusal(
    err: "HfHubHTTPError", repo_id: str, revision: str | None, endpoint: str
) -> str:
    """Return what an answer that is not the file means."""
    from huggingface_hub import errors

    page = f"{endpoint}/{repo_id}"
    if isinstance(err, errors.GatedRepoError):  # before its base, RepositoryNotFoundError
        return (
            f"{repo_id} is gated: its licence must be accepted at {page} by the account that "
            "downloads it. Then log in with `hf auth login`, or set HF_TOKEN to a token of that "
            "account that may read gated models"
        )
    if isinstance(err, errors.RepositoryNotFoundError):
        return (
            f"there is neither a folder {repo_id} here nor a model of that name at {page} (a "
            "private one looks the same without a token): check the name, or log in with "
            "`hf auth login` or HF_TOKEN"
        )
    if isinstance(err, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: {page}/tree/main lists what it has"
    response = getattr(err, "response", None)
    status = f"HTTP {response.status_code}" if response is not None else str(err).splitlines()[0]
    return f"{endpoint} refused {repo_id} ({status}): try again later, or check HF_TOKEN"


def _root(err: BaseException) -> BaseException:
    """Return the error at the start of a chain of explicit causes."""
    while err.__cause__ is not None:
        err = err.__cause__
    return err

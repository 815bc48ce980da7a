"""The error tree: everything gemma-deploy raises on purpose.

    GemmaDeployError
    ├── RequestError            what the caller asked for cannot be: an empty prompt, a bad option
    │   ├── PromptTooLongError  prompt and new tokens do not fit the KV cache
    │   └── OutputExistsError   the output is already there, and replacing it was not asked for
    ├── ConfigError             config.json: another family, or numbers that contradict each other
    ├── CheckpointError         weights: missing, truncated, wrong shape or dtype, pickle
    ├── TokenizerError          tokenizer files, chat templates
    ├── HubError                download from a model hub
    ├── ExportError             checkpoint -> bundle
    ├── BundleError             the bundle folder: missing or changed files, a broken manifest
    │   ├── BundleVersionError  written by a newer gemma-deploy
    │   └── UnsafePathError     a path that leaves the bundle
    ├── EngineError             an engine folder: missing or changed files, another GPU or library
    ├── EngineBuildError        bundle -> engine
    └── SessionError            running a model
        ├── BackendUnavailableError   a dependency or device that is not here
        └── NonFiniteLogitsError      the model put out NaN or infinity

A `GemmaDeployWarning` says what was decided on a caller's behalf and may be a surprise.

A message says what is wrong, what was expected, what was found, and what to do. Every class carries
the exit code that the command line uses for it. It is 2 for a request that cannot be, on any machine
and with any data: a value nobody knows, a path that is not there or is not what the command takes. It
is 1 for one that can be and failed: damaged files, the network, what this machine lacks.
"""

import sys
import warnings
from typing import ClassVar


class GemmaDeployError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line exits with."""

    exit_code: ClassVar[int] = 1


class GemmaDeployWarning(UserWarning):
    """What gemma-deploy decided on a caller's behalf: nothing failed, and it may be a surprise."""


def warn(message: str) -> None:
    """Issue a `GemmaDeployWarning` that points at the line outside this package that led to it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(
        "gemma_deploy."
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, GemmaDeployWarning, stacklevel=level)


class RequestError(GemmaDeployError):
    """The request itself cannot be served: an empty prompt, contradicting options."""

    exit_code: ClassVar[int] = 2


class PromptTooLongError(RequestError):
    """The prompt (with the tokens to generate) does not fit the KV cache."""


class OutputExistsError(RequestError):
    """The output exists already and replacing it was not asked for."""


class ConfigError(GemmaDeployError):
    """A model config of another family, or one whose numbers contradict each other."""


class CheckpointError(GemmaDeployError):
    """Weights that are missing, truncated, of the wrong shape or dtype, or in an unsafe format."""


class TokenizerError(GemmaDeployError):
    """Tokenizer files or chat templates that cannot be read or applied."""


class HubError(GemmaDeployError):
    """A model hub that refused, failed, or does not have what was asked for."""


class ExportError(GemmaDeployError):
    """A checkpoint that could not be turned into a bundle."""


class BundleError(GemmaDeployError):
    """A bundle whose files are missing, changed, or do not agree with its manifest."""


class BundleVersionError(BundleError):
    """A bundle in a format that this version does not know."""


class UnsafePathError(BundleError):
    """A path, in a manifest or a graph, that leaves the bundle folder."""


class EngineError(GemmaDeployError):
    """An engine that is damaged, or that this GPU or library cannot load."""


class EngineBuildError(GemmaDeployError):
    """A bundle that could not be turned into an engine."""


class SessionError(GemmaDeployError):
    """A model that could not be loaded or run."""


class BackendUnavailableError(SessionError):
    """A backend whose dependency or device is not on this machine."""


class NonFiniteLogitsError(SessionError):
    """Logits that hold NaN or infinity: no token can be chosen from them."""

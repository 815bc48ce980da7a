"""Loading a contender: the model as it is deployed, or a baseline on its checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gemma_deploy.runtime.benchmark.plan import ContenderSpec
from gemma_deploy.runtime.benchmark.results import OURS
from gemma_deploy.runtime.generator import PREFILL_CHUNK_TOKENS
from gemma_deploy.runtime.sessions.registry import create_session, natural_backend
from gemma_deploy.runtime.sessions.session import Session
from gemma_deploy.runtime.source import ModelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedContender:
    """What a worker runs.

    Attributes:
        session: What runs the steps.
        description: Backend, device and dtypes, for people.
        device: What it runs on: `cpu` or `cuda`.
        prefill_chunk: Most tokens of a prompt that it is given at a time.
    """

    session: Session
    description: str
    device: str
    prefill_chunk: int = PREFILL_CHUNK_TOKENS


def load_contender(spec: ContenderSpec) -> LoadedContender:
    """Load what a spec says.

    Raises:
        GemmaDeployError: It cannot be loaded, or not on that device.
    """
    return _LOADERS[spec.name](spec)


def _load_ours(spec: ContenderSpec) -> LoadedContender:
    source = ModelSource.open(Path(spec.model))
    session = create_session(
        source,
        backend=spec.backend,
        device=spec.device,
        threads=spec.threads,
        max_seq_len=spec.max_seq_len,
    )
    backend = natural_backend(source) if spec.backend == "auto" else spec.backend
    # Every backend's session says where it runs, though no caller but this one asks.
    device = getattr(session, "device").kind  # noqa: B009 - not in the protocol
    return LoadedContender(
        session=session,
        description=f"{backend} on {device}, {_formats(source)}",
        device=device,
    )


def _formats(source: ModelSource) -> str:
    """Return how a model's weights are stored, in a few words."""
    if source.bundle is None:
        return source.config.dtype or "float32" if source.engine is None else "engine"
    manifest = source.bundle.manifest
    stored = sorted({str(x) for x in manifest.formats.values()}) or [manifest.precision.weights]
    return f"weights {' '.join(stored)}, cache {manifest.precision.cache}"


_LOADERS: Mapping[str, Callable[[ContenderSpec], LoadedContender]] = MappingProxyType(
    {OURS: _load_ours}
)

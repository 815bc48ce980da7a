"""Loading a contender: the model as it is deployed, or a baseline on its checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from gemma_deploy.checkpoint import Checkpoint
from gemma_deploy.runtime.benchmark.baselines import own_dtype, packages_of
from gemma_deploy.runtime.benchmark.plan import ContenderSpec, cached_tokens
from gemma_deploy.runtime.benchmark.results import OURS, BenchCase
from gemma_deploy.runtime.benchmark.rounds import CaseRunner
from gemma_deploy.runtime.devices import Device
from gemma_deploy.runtime.generator import PREFILL_CHUNK_TOKENS
from gemma_deploy.runtime.opening import open_model
from gemma_deploy.runtime.sessions.registry import create_session, natural_backend
from gemma_deploy.runtime.sessions.session import Session
from gemma_deploy.runtime.source import ModelSource
from gemma_deploy.tokenizer import GemmaTokenizer

if TYPE_CHECKING:
    from gemma_deploy.runtime.benchmark.transformers_session import TransformersSession
    from gemma_deploy.runtime.sessions.torch_session import TorchSession

# CUDA graphs are recorded by the second run and replayed from the third on.
_COMPILING_RUNS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedContender:
    """What a worker runs.

    Attributes:
        session: What runs the steps.
        description: Backend, device and dtypes, for people.
        device: What it runs on: `cpu` or `cuda`.
        is_baseline: Whether its cache is of just the length that a case needs and a prompt is one step
            of all rows: the best that a loop around a torch model can do. Ours runs as it is deployed.
        extra_warmup: Runs of a case that it needs to compile before it is warm.
        tokenizer: Ours, held as it is where the model is deployed; None without one.
    """

    session: Session
    description: str
    device: str
    is_baseline: bool = False
    extra_warmup: int = 0
    tokenizer: GemmaTokenizer | None = None

    def case_runner(self, case: BenchCase) -> CaseRunner:
        """Return what runs a case in this session; what it needs to compile is yet to be run."""
        if self.is_baseline:
            return CaseRunner(
                self.session,
                case,
                prefill_chunk=case.prompt_tokens,
                max_seq_len=cached_tokens(case),
            )
        return CaseRunner(self.session, case, prefill_chunk=PREFILL_CHUNK_TOKENS)


def load_contender(spec: ContenderSpec) -> LoadedContender:
    """Load what a spec says.

    Raises:
        GemmaDeployError: It cannot be loaded, or not on that device.
    """
    return _LOADERS[spec.name](spec)


def _load_ours(spec: ContenderSpec) -> LoadedContender:
    source = ModelSource.open(Path(spec.model))
    options: dict[str, Any] = {
        "backend": spec.backend,
        "device": spec.device,
        "threads": spec.threads,
        "max_seq_len": spec.max_seq_len,
        "prepacked_cache": None if spec.prepacked_cache is None else Path(spec.prepacked_cache),
    }
    if GemmaTokenizer.files(source.folder):
        session, tokenizer = open_model(source, **options)
    else:
        session, tokenizer = create_session(source, **options), None
    backend = natural_backend(source) if spec.backend == "auto" else spec.backend
    # Every backend's session says where it runs, though no caller but this one asks.
    device = getattr(session, "device").kind  # noqa: B009 - not in the protocol
    return LoadedContender(
        session=session,
        description=f"{backend} on {device}, {_formats(source)}",
        device=device,
        tokenizer=tokenizer,
    )


def _formats(source: ModelSource) -> str:
    """Return how a model's weights are stored, in a few words."""
    if source.bundle is None:
        return source.config.dtype or "float32" if source.engine is None else "engine"
    manifest = source.bundle.manifest
    stored = sorted({str(x) for x in manifest.formats.values()}) or [manifest.precision.weights]
    return f"weights {' '.join(stored)}, cache {manifest.precision.cache}"


def _load_torch(spec: ContenderSpec) -> LoadedContender:
    from gemma_deploy.runtime.sessions.torch_session import TorchSession

    return _baseline(spec, TorchSession(**_arguments(spec)))


def _load_compiled(spec: ContenderSpec) -> LoadedContender:
    from gemma_deploy.runtime.benchmark.compiled_session import CompiledTorchSession

    session = CompiledTorchSession(**_arguments(spec))
    return _baseline(spec, session, extra_warmup=_COMPILING_RUNS)


def _load_transformers(spec: ContenderSpec) -> LoadedContender:
    from gemma_deploy.runtime.benchmark.transformers_session import TransformersSession

    return _baseline(spec, TransformersSession(**_arguments(spec)))


def _arguments(spec: ContenderSpec) -> dict[str, Any]:
    return {
        "checkpoint": Path(spec.model),
        "device": Device.parse(spec.device),
        "threads": spec.threads,
        "dtype": spec.dtype,
    }


def _baseline(
    spec: ContenderSpec, session: "TorchSession | TransformersSession", *, extra_warmup: int = 0
) -> LoadedContender:
    device = session.device.kind
    dtype = spec.dtype or own_dtype(Checkpoint.open(spec.model))
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages_of(spec.name))
    return LoadedContender(
        session=session,
        description=f"{versions} on {device}, {dtype}, static cache",
        device=device,
        is_baseline=True,
        extra_warmup=extra_warmup,
    )


_LOADERS: Final[Mapping[str, Callable[[ContenderSpec], LoadedContender]]] = MappingProxyType(
    {
        OURS: _load_ours,
        "torch-eager": _load_torch,
        "torch-compile": _load_compiled,
        "transformers": _load_transformers,
    }
)

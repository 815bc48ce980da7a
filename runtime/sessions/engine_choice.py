"""Which of a bundle's engines to run: `choose_engine`."""

from collections.abc import Iterator, Sequence
from typing import Final

from gemma_deploy.bundle import Bundle
from gemma_deploy.cuda_driver import Gpu
from gemma_deploy.engine import EngineFolder
from gemma_deploy.engine_fit import rebuild_advice, why_not_of, why_not_on, why_not_with
from gemma_deploy.errors import EngineError

_MOST_LISTED: Final = 5


def choose_engine(
    engines: Sequence[EngineFolder],
    bundle: Bundle,
    *,
    library_version: str,
    gpu: Gpu,
    max_seq_len: int | None,
) -> EngineFolder:
    """Return the first engine that fits the library, the GPU, the bundle and the request.

    Args:
        engines: At least one, from `gemma_deploy.engine.engines_of_flavour`.
        bundle: What they are kept in.
        library_version: Of the installed library.
        gpu: Where it is to run.
        max_seq_len: The KV cache the user wants, in tokens; None for the engine's.

    Raises:
        EngineError: None fits; with what stands against each and the command that builds one.
    """
    refused = []
    for engine in engines:
        reasons = list(_reasons(engine, bundle, library_version, gpu, max_seq_len))
        if not reasons:
            return engine
        refused.append(f"{engine.folder.name}: {'; '.join(reasons)}")
    more = f" (and {len(refused) - _MOST_LISTED} more)" if len(refused) > _MOST_LISTED else ""
    raise EngineError(
        f"none of the {len(refused)} {engines[0].manifest.build.flavour} engine(s) of "
        f"{bundle.folder} can be used here. {'. '.join(refused[:_MOST_LISTED])}{more}. "
        f"For one like the latest, {rebuild_advice(engines[0], gpu, max_seq_len)}"
    )


def _reasons(
    engine: EngineFolder, bundle: Bundle, library_version: str, gpu: Gpu, max_seq_len: int | None
) -> Iterator[str]:
    build = engine.manifest.build
    judged = (why_not_of(build, bundle), why_not_with(build, library_version))
    yield from (reason for reason in (*judged, why_not_on(build, gpu)) if reason is not None)
    if max_seq_len is not None and max_seq_len > build.limits.max_seq_len:
        yield (
            f"its KV cache holds {build.limits.max_seq_len:,} tokens, {max_seq_len:,} are asked for"
        )

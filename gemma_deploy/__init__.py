"""Put Google's Gemma language models into production: ONNX export, ONNX Runtime, streaming text."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_deploy.api import build, export, load, pack, pipeline
    from gemma_deploy.config import GemmaConfig
    from gemma_deploy.errors import GemmaDeployError
    from gemma_deploy.exporters.engine import BuildOptions
    from gemma_deploy.runtime.request import GenerationOptions
    from gemma_deploy.runtime.result import GenerationResult
    from gemma_deploy.runtime.text_generator import TextGenerator

    __version__: str

__all__ = [
    "BuildOptions",
    "GemmaConfig",
    "GemmaDeployError",
    "GenerationOptions",
    "GenerationResult",
    "TextGenerator",
    "build",
    "export",
    "load",
    "pack",
    "pipeline",
]

# Public name -> module that has it, imported on first use: `import gemma_deploy` costs nothing.
_HOMES = {
    "BuildOptions": "gemma_deploy.exporters.engine",
    "GemmaConfig": "gemma_deploy.config",
    "GemmaDeployError": "gemma_deploy.errors",
    "GenerationOptions": "gemma_deploy.runtime.request",
    "GenerationResult": "gemma_deploy.runtime.result",
    "TextGenerator": "gemma_deploy.runtime.text_generator",
    "build": "gemma_deploy.api",
    "export": "gemma_deploy.api",
    "load": "gemma_deploy.api",
    "pack": "gemma_deploy.api",
    "pipeline": "gemma_deploy.api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gemma-deploy")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])

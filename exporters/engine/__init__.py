"""Bundle to engine: optimization profiles, the builder, and the process it runs in."""

from gemma_deploy.exporters.engine.build import BuiltEngine, build_engine
from gemma_deploy.exporters.engine.options import BuildOptions
from gemma_deploy.exporters.engine.pack import pack_engine

__all__ = ["BuildOptions", "BuiltEngine", "build_engine", "pack_engine"]

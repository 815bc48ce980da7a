"""The torch model: one definition of Gemma 1, 2 and 3, driven by its config."""

from gemma_deploy.model.heads import GemmaForCausalLM
from gemma_deploy.model.kv_cache import DynamicCache, StaticCache
from gemma_deploy.model.outputs import CausalLMOutput, ModelOutput
from gemma_deploy.model.transformer import GemmaModel

__all__ = [
    "CausalLMOutput",
    "DynamicCache",
    "GemmaForCausalLM",
    "GemmaModel",
    "ModelOutput",
    "StaticCache",
]

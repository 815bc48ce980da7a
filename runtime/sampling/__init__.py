"""Choosing tokens from logits, on any array library of the array API standard."""

from gemma_deploy.runtime.sampling.filters import Temperature, TopK, TopP
from gemma_deploy.runtime.sampling.highest import highest_if_finite
from gemma_deploy.runtime.sampling.methods import Greedy, Sampled, SamplingMethod, sampling_method
from gemma_deploy.runtime.sampling.repetition_penalty import RepetitionPenalty

__all__ = [
    "Greedy",
    "RepetitionPenalty",
    "Sampled",
    "SamplingMethod",
    "Temperature",
    "TopK",
    "TopP",
    "highest_if_finite",
    "sampling_method",
]

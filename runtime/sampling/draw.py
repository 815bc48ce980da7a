"""One random choice: a uniform number turned into a token by inverting the cumulative sum."""

from array_api_compat import array_namespace

from gemma_deploy.runtime.sampling.candidates import Candidates
from gemma_deploy.runtime.sampling.cumulative import passing_index


def draw(candidates: Candidates, uniform: float) -> int:
    """Return the token id at `uniform` in the cumulative probabilities of the candidates.

    Args:
        candidates: Unnormalized log-probabilities, in token-id order.
        uniform: A number in [0, 1).
    """
    xp = array_namespace(candidates.logits)
    weights = xp.exp(candidates.logits - xp.max(candidates.logits))
    return candidates.token_id(passing_index(weights, uniform))

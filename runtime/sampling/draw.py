"""One random choice: a uniform number turned into a token by inverting the cumulative sum."""

from array_api_compat import array_namespace

from gemma_deploy.runtime.sampling.candidates import Array, Candidates

_BLOCK_TOKENS = 512
# The largest fraction that, times a sum, stays below that sum in float64.
_BELOW_ONE = 1 - 2.0**-40


def draw(candidates: Candidates, uniform: float) -> int:
    """Return the token id at `uniform` in the cumulative probabilities of the candidates.

    Large sets are inverted in two levels, first blocks and then inside one, because a cumulative sum
    over a whole vocabulary costs more than everything else in a step of the loop.

    Args:
        candidates: Unnormalized log-probabilities, in token-id order.
        uniform: A number in [0, 1).
    """
    xp = array_namespace(candidates.logits)
    weights = xp.exp(candidates.logits - xp.max(candidates.logits))
    blocks = len(candidates) // _BLOCK_TOKENS
    if blocks < 2:
        return candidates.token_id(_invert(weights, uniform)[0])
    whole = blocks * _BLOCK_TOKENS
    sums = xp.sum(xp.reshape(weights[:whole], (blocks, _BLOCK_TOKENS)), axis=1)
    if whole < len(candidates):
        sums = xp.concat([sums, xp.reshape(xp.sum(weights[whole:]), (1,))])
    block, within = _invert(sums, uniform)
    start = block * _BLOCK_TOKENS
    return candidates.token_id(start + _invert(weights[start : start + _BLOCK_TOKENS], within)[0])


def _invert(weights: Array, fraction: float) -> tuple[int, float]:
    """Return where the cumulative weights pass `fraction` of their sum, and how far into that entry.

    The entry's weight is never zero.
    """
    xp = array_namespace(weights)
    cumulative = xp.cumulative_sum(weights, dtype=xp.float64)
    target = min(fraction, _BELOW_ONE) * float(cumulative[-1])
    index = int(xp.sum(cumulative <= target, dtype=xp.int64))
    weight = float(weights[index])
    before = float(cumulative[index]) - weight
    return index, min(max((target - before) / weight, 0.0), _BELOW_ONE)

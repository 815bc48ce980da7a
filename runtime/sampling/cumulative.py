"""Where a cumulative sum passes a target, without summing up a whole vocabulary."""

from array_api_compat import array_namespace

from gemma_deploy.runtime.sampling.candidates import Array

_BLOCK_TOKENS = 512
# The largest fraction that, times a sum, stays below that sum in float64.
_BELOW_ONE = 1 - 2.0**-40


def passing_index(weights: Array, fraction: float) -> int:
    """Return the first index at which the cumulative weights pass `fraction` of their sum.

    The index is found in two levels, first the block and then the place in it: a cumulative sum over
    256,000 weights costs more than everything else that is done to choose a token.

    Args:
        weights: float32 [C], none negative, some positive.
        fraction: In [0, 1]. From 1 the last index with a weight above zero is returned.

    Returns:
        An index whose weight is above zero.
    """
    xp = array_namespace(weights)
    blocks = weights.shape[0] // _BLOCK_TOKENS
    if blocks < 2:
        return _pass(weights, fraction)[0]
    whole = blocks * _BLOCK_TOKENS
    sums = xp.sum(xp.reshape(weights[:whole], (blocks, _BLOCK_TOKENS)), axis=1)
    if whole < weights.shape[0]:
        sums = xp.concat([sums, xp.reshape(xp.sum(weights[whole:]), (1,))])
    block, within = _pass(sums, fraction)
    start = block * _BLOCK_TOKENS
    stop = min(start + _BLOCK_TOKENS, weights.shape[0])  # the standard's slices end in bounds
    return start + _pass(weights[start:stop], within)[0]


def _pass(weights: Array, fraction: float) -> tuple[int, float]:
    """Return where the cumulative weights pass `fraction`, and the fraction of that entry's weight."""
    xp = array_namespace(weights)
    cumulative = xp.cumulative_sum(weights, dtype=xp.float64)
    target = min(fraction, _BELOW_ONE) * float(cumulative[-1])
    index = int(xp.sum(xp.astype(cumulative <= target, xp.int64)))
    weight = float(weights[index])
    before = float(cumulative[index]) - weight
    return index, min(max((target - before) / weight, 0.0), _BELOW_ONE)

"""tokenizer.json in a form that loads in less than half the time: `compact_tokenizer`.

Gemma's file lists every pair of tokens that makes a token, half a million of them. Most never apply:
whatever the text, other pairs of the same letters are joined before. Encoding joins the pair that is
listed first among all neighbours, again and again, and joined letters are never parted. So what happens
to the letters of a pair, as long as nothing joins them with those outside, is what happens to them
alone: a pair that does not apply to its own letters alone applies nowhere, and can be left out.

The library also reads pairs sooner as strings than as lists, and tokens sooner in the order of their
bytes than in that of their ids.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

from tokenizers import Tokenizer

Pair = tuple[str, str]

# Finding out which pair applies takes the square of a token's length; Gemma's longest has 32 letters.
_MAX_LETTERS: Final = 256
# The library takes such strings for a comment.
_COMMENT: Final = "#version"
# Texts that are compared hold tokens so far apart, and begin so far apart.
_STRIDE: Final = 1009
_TEXT_STRIDE: Final = 10


def compact_tokenizer(text: str) -> str | None:
    """Return a tokenizer.json that gives the same ids and texts, and loads sooner.

    The result has been loaded and compared: vocabulary, added tokens and all else but the pairs are
    the same, and so are the ids of every token's text, alone and among others.

    Args:
        text: The contents of a tokenizer.json that the library loads.

    Returns:
        None for a file whose encoding may depend on pairs that are left out, or differs.
    """
    spec = json.loads(text)
    model = spec["model"]
    if model.get("type") != "BPE":
        return None
    pairs = _pairs(model["merges"])
    if not _joins_letters_only(model, pairs):
        return None
    kept = applicable_pairs(pairs)
    if not all(_is_plain(pair) for pair in kept):
        return None
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda entry: entry[0].encode()))
    spec["model"] = {**model, "vocab": vocabulary, "merges": list(map(" ".join, kept))}
    compact = json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
    return compact if _is_same(text, compact, list(vocabulary)) else None


def applicable_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    """Return the pairs that can apply, in their order.

    Args:
        pairs: In the order in which they are preferred; of a pair that comes twice, the second counts,
            as it does to the library. Each is made of whole letters.
    """
    ranks = {pair: rank for rank, pair in enumerate(pairs)}
    makers: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in ranks:
        makers["".join(pair)].append(pair)
    kept: list[Pair] = []
    for token, candidates in makers.items():
        if len(candidates) == 1 or len(token) > _MAX_LETTERS:
            kept += candidates
        else:
            kept += [pair for pair in [_last_pair(token, ranks)] if pair in ranks]
    return sorted(kept, key=ranks.__getitem__)


def _last_pair(token: str, ranks: dict[Pair, int]) -> tuple[str, ...]:
    """Join the letters of a token until two parts are left, or none of the neighbours is a pair."""
    parts = list(token)
    never = len(ranks)
    while len(parts) > 2:
        neighbours = [ranks.get(pair, never) for pair in itertools.pairwise(parts)]
        first = min(neighbours)
        if first == never:
            break
        at = neighbours.index(first)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def _pairs(merges: Sequence[Any]) -> list[Pair]:
    """Return pairs as the library reads them: two strings, or one with a space between them."""
    if not merges or not isinstance(merges[0], str):
        return [(left, right) for left, right in merges]
    split = (line.split(" ") for line in merges if not line.startswith(_COMMENT))
    return [(left, right) for left, right in split]


def _joins_letters_only(model: dict[str, Any], pairs: Iterable[Pair]) -> bool:
    """Tell whether joining starts from letters, and from nothing else that a pair names."""
    settings = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if any(model.get(name) for name in settings):
        return False
    # What stands for a letter that the vocabulary does not have.
    stand_ins = {model.get("unk_token"), *(f"<0x{byte:02X}>" for byte in range(256))}
    return stand_ins.isdisjoint(itertools.chain.from_iterable(pairs))


def _is_plain(pair: Pair) -> bool:
    """Tell whether a pair can be written as one string."""
    return not pair[0].startswith(_COMMENT) and " " not in "".join(pair)


def _is_same(text: str, compact: str, tokens: Sequence[str]) -> bool:
    """Load both and compare all but the pairs, and what they make of the tokens."""
    first, second = Tokenizer.from_str(text), Tokenizer.from_str(compact)
    if _all_but_pairs(first) != _all_but_pairs(second):
        return False
    words = [first.model.tokenize, second.model.tokenize]
    if any(_ids(words[0](token)) != _ids(words[1](token)) for token in tokens):
        return False
    texts = ("".join(tokens[start::_STRIDE]) for start in range(0, _STRIDE, _TEXT_STRIDE))
    return all(first.encode(x).ids == second.encode(x).ids for x in texts)


def _all_but_pairs(tokenizer: Tokenizer) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    spec["model"].pop("merges")
    return spec


def _ids(tokens: Iterable[Any]) -> list[int]:
    return [token.id for token in tokens]

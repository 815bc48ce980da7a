import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gemma_deploy.exporters.compact_tokenizer import applicable_pairs, compact_tokenizer

TINY_GEMMA = Path(__file__).parents[2] / "samples" / "tiny-gemma"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def spec_of(pairs: list[tuple[str, str]], **model: Any) -> dict[str, Any]:
    """Return a tokenizer.json in Gemma's layout whose tokens are what the pairs need."""
    spec: dict[str, Any] = json.loads((TINY_GEMMA / "tokenizer.json").read_text())
    made = ["".join(pair) for pair in pairs]
    parts = [part for pair in pairs for part in pair]
    tokens = dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *"abcd", *parts, *made])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    spec["added_tokens"] = [x for x in spec["added_tokens"] if x["content"] in vocabulary]
    merges = list(map(list, pairs))
    spec["model"] |= {"vocab": vocabulary, "merges": merges, **model}
    return spec


def random_pairs(source: random.Random) -> list[tuple[str, str]]:
    """Return every way to part some random words into two tokens, in random order, as Gemma has it."""
    tokens = set("abcd")
    for _ in range(source.randint(3, 100)):
        token = "".join(source.choices(sorted(tokens), k=2))
        tokens |= {token} if len(token) <= 6 else set()
    pairs = [
        (token[:at], token[at:])
        for token in sorted(tokens)
        for at in range(1, len(token))
        if {token[:at], token[at:]} <= tokens
    ]
    source.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("seed", range(60))
def test_pairs_that_are_left_out_never_apply(seed: int) -> None:
    source = random.Random(seed)
    text = json.dumps(spec_of(random_pairs(source)))
    compact = compact_tokenizer(text)
    assert compact is not None
    first, second = Tokenizer.from_str(text), Tokenizer.from_str(compact)
    for _ in range(300):
        sample = "".join(source.choices("abcdé ", [5, 4, 3, 2, 1, 1], k=source.randint(0, 40)))
        assert first.encode(sample).ids == second.encode(sample).ids


def test_many_pairs_are_left_out() -> None:
    pairs = [random_pairs(random.Random(seed)) for seed in range(60)]
    assert sum(map(len, map(applicable_pairs, pairs))) < 0.9 * sum(map(len, pairs))


def test_which_pairs_apply_and_their_order() -> None:
    # "ab" is joined first, so "a", "bc" never meet; "aab" is made of "a", "ab" likewise.
    pairs = [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc"), ("a", "a"), ("aa", "b"), ("a", "ab")]
    assert applicable_pairs(pairs) == [pairs[0], pairs[1], pairs[2], pairs[4], pairs[6]]


def test_of_a_pair_that_comes_twice_the_second_counts() -> None:
    pairs = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("a", "b")]
    assert applicable_pairs(pairs) == [pairs[1], pairs[3], pairs[4]]
    compact = compact_tokenizer(json.dumps(spec_of(pairs)))
    assert compact is not None
    assert Tokenizer.from_str(compact).encode("abc").tokens == ["<bos>", "abc"]


def test_pairs_of_either_spelling() -> None:
    spec = spec_of([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")])
    lists = compact_tokenizer(json.dumps(spec))
    spec["model"]["merges"] = ["#version: 0.2", *map(" ".join, spec["model"]["merges"])]
    assert lists is not None
    assert compact_tokenizer(json.dumps(spec)) == lists
    assert json.loads(lists)["model"]["merges"] == ["a b", "ab c", "b c"]


def test_the_sample_stays_what_it_is() -> None:
    text = (TINY_GEMMA / "tokenizer.json").read_text(encoding="utf-8")
    compact = compact_tokenizer(text)
    assert compact is not None
    given, made = json.loads(text), json.loads(compact)
    assert made["model"].pop("merges") == [" ".join(x) for x in given["model"].pop("merges")]
    assert made == given
    assert list(made["model"]["vocab"]) == sorted(given["model"]["vocab"], key=str.encode)


@pytest.mark.parametrize(
    ("pairs", "model"),
    [
        ([("<0x41>", "a")], {}),  # bytes stand for any letter that is not in the vocabulary
        ([("a", "<unk>")], {}),
        ([("a", "b")], {"dropout": 0.5}),
        ([("a", "b")], {"ignore_merges": True}),
        ([("a", " ")], {}),  # cannot be told from the space between two tokens
        ([("#version", "a")], {}),  # would be a comment
    ],
)
def test_what_is_left_alone(pairs: list[tuple[str, str]], model: dict[str, Any]) -> None:
    text = json.dumps(spec_of(pairs, **model))
    Tokenizer.from_str(text)  # the premise: the library takes it
    assert compact_tokenizer(text) is None

"""A byte-pair tokenizer in Gemma's layout, learned from the texts of samples/tiny-gemma."""

import json

import click
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CONTROL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
_SPACE = "▁"
_LONGEST_RUNS = {_SPACE: 16, "\n": 4}


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Return a tokenizer of exactly `vocab_size` entries.

    Runs of spaces and line breaks are tokens of their own, as in Gemma; their merges come first, so
    that an indented word is split like one at the start of a line. Digits stay single.
    """
    runs = [char * n for char, longest in _LONGEST_RUNS.items() for n in range(1, longest + 1)]
    fixed = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *runs, *"0123456789"]
    learned, merges = _learn_merges(texts, vocab_size - len(fixed) + 1)
    tokens = [*fixed, *(token for token in learned if token not in set(fixed))][:vocab_size]
    if len(tokens) < vocab_size:
        raise click.UsageError(
            f"--vocab-size is {vocab_size}, yet the text holds {len(tokens)} tokens worth learning: "
            f"ask for at most {len(tokens)}, or read more documents"
        )
    known = set(tokens)
    merges = [pair for pair in merges if known.issuperset((*pair, "".join(pair)))]
    run_merges = [
        pair for char, longest in _LONGEST_RUNS.items() for pair in _run_merges(char, longest)
    ]
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=run_merges + merges,
        unk_token="<unk>",  # noqa: S106  # not a password
        fuse_unk=True,
        byte_fallback=True,
    )
    return _in_gemma_layout(bpe)


def _learn_merges(texts: list[str], vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Return tokens and merges inside words and inside punctuation, the most frequent first."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", _SPACE)
    words = r"▁?[A-Z]?[a-z]+|▁?[A-Z]+|▁?[^▁\sA-Za-z0-9]+|▁"
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"▁{2,}|\n+|\d"), "removed"),
            pre_tokenizers.Split(Regex(words), "isolated"),
        ]
    )
    # Rare characters are left to their bytes.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, limit_alphabet=120, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(p) for p in model["merges"]]


def _run_merges(char: str, longest: int) -> list[tuple[str, str]]:
    """Return merges that make one token of every run of `char` up to `longest`, a power of two."""
    sizes = [2**i for i in range(longest.bit_length())]
    doubling = [(char * n, char * n) for n in sizes[:-1]]
    # A run of 7 has become 4, 2, 1 by now: larger parts take up smaller ones, the largest first.
    rest = [
        (char * left, char * right)
        for right in reversed(sizes)
        for left in range(longest - right, 0, -1)
        if left % (2 * right) == 0
    ]
    return doubling + rest


def _in_gemma_layout(bpe: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    )
    return tokenizer

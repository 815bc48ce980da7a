"""A tokenizer of as many tokens as a model has, for random checkpoints: `write_tokenizer`."""

import json
import random
import shutil
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TINY_GEMMA = Path(__file__).parents[1] / "samples" / "tiny-gemma"
_MAX_LETTERS = 10


def write_tokenizer(folder: Path, num_tokens: int) -> None:
    """Write the tokenizer of samples/tiny-gemma, filled up to a number of tokens: the same each time.

    New tokens are two others joined, and are listed with every pair that makes them, as Gemma's are. A
    bundle, which keeps one pair of each token, loads it as slowly as a real one, and in as much memory.

    Args:
        folder: An existing folder.
        num_tokens: At least 2,048, which tiny-gemma has.
    """
    for name in TOKENIZER_FILES:
        shutil.copyfile(_TINY_GEMMA / name, folder / name)
    path = folder / TOKENIZER_FILES[0]
    spec = json.loads(path.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    merges: list[list[str]] = spec["model"]["merges"]
    tokens = sorted({token for pair in merges for token in (*pair, "".join(pair))})
    parts = [token for token in tokens if len(token) <= _MAX_LETTERS // 2]
    source = random.Random(0)  # noqa: S311 - no secret
    while len(vocabulary) < num_tokens:
        token = source.choice(parts) + source.choice(parts)
        if token in vocabulary:
            continue
        parted = [(token[:at], token[at:]) for at in range(1, len(token))]
        merges += [[x, y] for x, y in parted if x in vocabulary and y in vocabulary]
        vocabulary[token] = len(vocabulary)
        if len(token) <= _MAX_LETTERS // 2:
            parts.append(token)
    path.write_text(json.dumps(spec, ensure_ascii=False, indent=2), encoding="utf-8")

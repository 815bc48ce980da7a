"""The `tokenizers` backend: minimal, or read from tokenizer.json."""

import json
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from gemma_deploy.errors import TokenizerError
from gemma_deploy.limits import MAX_TOKENIZER_BYTES
from gemma_deploy.quoting import shortened_text
from gemma_deploy.tokenizer.settings import TOKENIZER_FILE

MINIMAL_VOCABULARY: Final = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")

_GEMMA_SPACES: Final = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_GEMMA_DECODER: Final = (
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
)


def minimal_backend() -> Tokenizer:
    """Return a tokenizer that knows Gemma's five named tokens and nothing else.

    It has the vocabulary that transformers' `GemmaTokenizer` has when it is given no files:
    every other text is `<unk>`.
    """
    vocabulary = {token: index for index, token in enumerate(MINIMAL_VOCABULARY)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[],
            fuse_unk=True,
            unk_token=MINIMAL_VOCABULARY[3],
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(list(MINIMAL_VOCABULARY))
    return backend


def read_backend(folder: Path) -> Tokenizer:
    """Read `tokenizer.json` of a folder.

    Raises:
        TokenizerError: The file is missing, cannot be read, or holds another family's tokenizer.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise TokenizerError(_missing(folder))
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise TokenizerError(
            f"{path} is larger than {MAX_TOKENIZER_BYTES:,} bytes, which no tokenizer needs: it is "
            "damaged or another file. Download the file again."
        )
    try:
        backend = Tokenizer.from_file(str(path))
        backend.no_padding()  # to a length that the file states
        backend.no_truncation()
        backend.encode("")  # what is missing in a post processor shows only now
    except BaseException as err:
        # The library raises bare Exception, and its panics are not even that.
        if not isinstance(err, Exception) and type(err).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"{path} cannot be read as a tokenizer: {shortened_text(str(err), 300)}. Expected the "
            "JSON that the tokenizers library saves. Download the file again."
        ) from err
    _check_layout(backend, path)
    return backend


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder: expected one that holds tokenizer.json."
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder} has the tokenizer as tokenizer.model (SentencePiece) only; expected "
            "tokenizer.json. Convert it once, with transformers and sentencepiece installed: "
            f'python -c "from transformers import AutoTokenizer as T; p = {str(folder)!r}; '
            'T.from_pretrained(p).save_pretrained(p)"'
        )
    return (
        f"{folder} has no tokenizer.json. Download it from where the checkpoint came from, and put "
        "it beside config.json."
    )


def _check_layout(backend: Tokenizer, path: Path) -> None:
    """Refuse what streaming and the guard against control tokens are not written for.

    Both rest on two properties of Gemma's pipeline: the normalizer changes nothing but spaces
    (another could turn harmless characters into a control token), and the decoder looks at one
    token, or one run of byte tokens, at a time.
    """
    normalizer, decoder = (
        _steps(backend.normalizer, "normalizers"),
        _steps(backend.decoder, "decoders"),
    )
    pre_tokenizer = _steps(backend.pre_tokenizer, "pretokenizers")
    if not isinstance(backend.model, models.BPE):
        problem = f"its model is {type(backend.model).__name__}"
    elif any(step != _GEMMA_SPACES for step in normalizer):
        problem = f"its normalizer is {_quoted(normalizer)}"
    elif not decoder or any(step not in _GEMMA_DECODER for step in decoder):
        problem = f"its decoder is {_quoted(decoder)}"
    elif '"Regex": ' in json.dumps(pre_tokenizer):  # as a key: quotes in a string are escaped
        # Some never end, and the library panics.
        problem = f"its pre-tokenizer is {_quoted(pre_tokenizer)}"
    else:
        return
    raise TokenizerError(
        f"{path} is not a Gemma tokenizer: {problem}. Expected BPE, a normalizer that replaces "
        "spaces by '▁', a decoder of Replace, ByteFallback and Fuse, and a pre-tokenizer without "
        "regular expressions. Use the tokenizer.json "
        "that belongs to the Gemma checkpoint."
    )


def _quoted(steps: list[dict[str, Any]]) -> str:
    return shortened_text(json.dumps(steps, ensure_ascii=False), 300)


def _steps(component: Any, sequence_key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or decoder as tokenizer.json has them; none for None."""
    if component is None:
        return []
    state: dict[str, Any] = json.loads(component.__getstate__())
    steps: list[dict[str, Any]] = state.get(sequence_key, [state])
    return steps

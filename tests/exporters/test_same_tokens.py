"""What a bundle's tokenizer gives is what the library `tokenizers` gives with the checkpoint's."""

import os
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gemma_deploy.exporters.compact_tokenizer import compact_tokenizer
from gemma_deploy.tokenizer import GemmaTokenizer
from tests.tokenizer_texts import id_lists, texts

TINY_GEMMA = Path(__file__).parents[2] / "samples" / "tiny-gemma"
REAL = os.environ.get("GEMMA_DEPLOY_REAL_CHECKPOINT", "")


def check_same(folder: Path, scratch: Path) -> None:
    """Compare a folder's tokenizer.json, read by the library, with its compact form, read by us."""
    path = folder / "tokenizer.json"
    compact = compact_tokenizer(path.read_text(encoding="utf-8"))
    assert compact is not None
    (scratch / "tokenizer.json").write_bytes(compact.encode())
    shutil.copyfile(folder / "tokenizer_config.json", scratch / "tokenizer_config.json")
    theirs, ours = Tokenizer.from_file(str(path)), GemmaTokenizer.from_pretrained(scratch)
    vocabulary = theirs.get_vocab()
    assert ours.vocab_size == len(vocabulary)
    for token, token_id in vocabulary.items():
        assert ours.token_to_id(token) == token_id
        assert ours.id_to_token(token_id) == token
    cases = texts(sorted(vocabulary))
    assert len(cases) > 5820
    for text in cases:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_bos=False) == ids, text[:100]
        assert ours.decode(ids) == theirs.decode(ids), text[:100]
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(
            ids, skip_special_tokens=False
        )
    # Those that only tokenizer_config.json calls special are so to us alone.
    known = {x for x, token in theirs.get_added_tokens_decoder().items() if token.special}
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]  # Gemma 2 has no tab
    special = [*known, *(vocabulary[x] for x in byte_tokens if x in vocabulary)]
    for ids in id_lists(len(vocabulary), special):
        for skips in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skips)
            assert ours.decode(ids, skip_special_tokens=skips) == expected
            stream = ours.stream(skip_special_tokens=skips)
            assert "".join([*map(stream.push, ids), stream.finish()]) == expected


def test_tiny_gemma(tmp_path: Path) -> None:
    check_same(TINY_GEMMA, tmp_path)


@pytest.mark.real
@pytest.mark.skipif(not REAL, reason="GEMMA_DEPLOY_REAL_CHECKPOINT names no folder")
def test_a_real_checkpoint(tmp_path: Path) -> None:
    check_same(Path(REAL), tmp_path)

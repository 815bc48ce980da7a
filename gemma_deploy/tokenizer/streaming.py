"""Text from token ids, one id at a time."""

import re
from collections.abc import Callable, Sequence
from typing import SupportsIndex

# What the ByteFallback decoder of the tokenizers library accepts: it parses the two characters as
# Rust's u8::from_str_radix does, which allows a sign.
_BYTE_TOKEN = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class StreamingDetokenizer:
    """Turns a sequence of token ids into text piece by piece.

    The pieces that `push` returns and the one that `finish` returns, joined, are exactly what
    `GemmaTokenizer.decode` gives for all ids at once, whatever the ids are. The time per token
    does not depend on how much text there is already.

    A run of byte tokens (`<0xE2>` `<0x82>` `<0xAC>`) is text only once the run has ended: as in
    `decode`, one invalid byte turns every byte of its run into U+FFFD. Until then nothing of the
    run is returned, so no piece ends inside a character.

    Obtained from `GemmaTokenizer.stream`. Not to be shared between threads.

    Args:
        token_of: Id to token; raises TokenizerError for an id outside the vocabulary.
        decode_tokens: Joins tokens into text, as the tokenizer's decoder does.
        is_skipped: Whether an id is to be left out of the text.
    """

    def __init__(
        self,
        token_of: Callable[[SupportsIndex], str],
        decode_tokens: Callable[[Sequence[str]], str],
        is_skipped: Callable[[int], bool],
    ) -> None:
        self._token_of = token_of
        self._decode_tokens = decode_tokens
        self._is_skipped = is_skipped
        self._byte_run: list[str] = []

    def push(self, token_id: SupportsIndex) -> str:
        """Take the next id and return the text that it completes, often with none of its own.

        Raises:
            TokenizerError: The id is outside the vocabulary; the detokenizer is unchanged.
        """
        token = self._token_of(token_id)
        if self._is_skipped(token_id.__index__()):
            return ""
        if _BYTE_TOKEN.fullmatch(token):
            self._byte_run.append(token)
            return ""
        return self._end_byte_run() + self._decode_tokens([token])

    def finish(self) -> str:
        """Return the text still held back; the detokenizer is then ready for a new text."""
        return self._end_byte_run()

    def _end_byte_run(self) -> str:
        if not self._byte_run:
            return ""
        text = self._decode_tokens(self._byte_run)
        self._byte_run = []
        return text

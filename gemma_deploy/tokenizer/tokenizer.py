"""The tokenizer of a Gemma checkpoint."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from gemma_deploy.errors import TokenizerError
from gemma_deploy.quoting import shortened
from gemma_deploy.tokenizer.backend import minimal_backend, read_backend
from gemma_deploy.tokenizer.chat_guard import guarded_pieces
from gemma_deploy.tokenizer.chat_template import ChatTemplate
from gemma_deploy.tokenizer.content_forms import contents_as_read
from gemma_deploy.tokenizer.control_tokens import split_at
from gemma_deploy.tokenizer.conversation import Conversation
from gemma_deploy.tokenizer.settings import (
    TOKENIZER_FILE,
    TokenizerSettings,
    tokenizer_files,
)
from gemma_deploy.tokenizer.streaming import StreamingDetokenizer
from gemma_deploy.tokenizer.turn_tokens import TurnTokens, find_turn_tokens
from gemma_deploy.tokenizer.vocabulary import TURN_TOKENS, Vocabulary


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchEncoding:
    """Texts of different lengths as one array.

    Attributes:
        input_ids: [B, S] int64, S being the longest text's number of tokens.
        attention_mask: [B, S] int64, 1 at tokens and 0 at padding.
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]


class GemmaTokenizer:
    """Turns text into Gemma's token ids, and ids into text.

    Without arguments it has the minimal vocabulary that transformers' `GemmaTokenizer` has then
    (five special tokens; everything else is `<unk>`; `<bos>` is not added). Safe to share between
    threads.

    Args:
        backend: A tokenizer in Gemma's layout. It is taken over: padding, truncation and the post
            processor it has are replaced.
        settings: What the backend does not hold.

    Raises:
        TokenizerError: The settings name a token that the backend does not have.
    """

    def __init__(
        self, backend: Tokenizer | None = None, settings: TokenizerSettings | None = None
    ) -> None:
        if backend is None:
            backend = minimal_backend()
            settings = settings or TokenizerSettings(
                named_tokens={"mask_token": "<mask>"}, add_bos=False
            )
        settings = settings or TokenizerSettings()
        self._backend = backend
        self._settings = settings
        backend.no_padding()
        backend.no_truncation()
        self._vocabulary = Vocabulary(backend, settings)
        self._chat_template = ChatTemplate(
            settings.chat_template,
            self._vocabulary.named_tokens,
            self._vocabulary.control_tokens,
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GemmaTokenizer":
        """Read the tokenizer of a checkpoint or bundle folder.

        As in transformers 5, `<bos>` comes in front of a text if the post processor in tokenizer.json
        puts it there, whatever `add_bos_token` in tokenizer_config.json says. Where there is no post
        processor, `<bos>` is added unless that flag is false: Gemma was trained with it, and
        transformers 5 leaves it out there. `<eos>` is never put behind a text unasked, whatever the
        files say: it is for training rows, and behind it a model starts anew instead of going on.

        Raises:
            TokenizerError: There is no tokenizer.json, a file cannot be read, or it is not Gemma's.
        """
        folder = Path(folder)
        return cls(read_backend(folder), TokenizerSettings.read(folder))

    @staticmethod
    def files(folder: str | Path) -> list[Path]:
        """Return the tokenizer's files that exist in a folder."""
        return tokenizer_files(Path(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, if there is one, the chat template.

        Raises:
            TokenizerError: The folder cannot be written.
        """
        folder = Path(folder)
        settings = dataclasses.replace(self._settings, named_tokens=self._vocabulary.named_tokens)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            settings.write(folder)
            (folder / TOKENIZER_FILE).write_bytes(self._backend.to_str(pretty=True).encode())
        except OSError as err:
            raise TokenizerError(
                f"The tokenizer cannot be saved in {folder}: {err}. Expected a writable folder."
            ) from err

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included: what `len()` of transformers' tokenizer is."""
        return self._vocabulary.size

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text; None if there is none."""
        return self._vocabulary.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text; None if there is none."""
        return self._vocabulary.eos_token_id

    @property
    def pad_token_id(self) -> int | None:
        """Id of the token that fills up a batch; None if there is none."""
        return self._vocabulary.pad_token_id

    def token_to_id(self, token: str) -> int | None:
        """Return a token's id; None for what is not a token."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: SupportsIndex) -> str:
        """Return the token of an id, as it is in the vocabulary (spaces are U+2581).

        Raises:
            TokenizerError: The id is outside the vocabulary.
        """
        return self._vocabulary.token(token_id)

    def encode(
        self,
        text: str,
        *,
        add_bos: bool | None = None,
        add_eos: bool = False,
        allow_special: bool = True,
    ) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Any text, also none.
            add_bos: Whether `<bos>` comes first (once: not if the text itself starts with it);
                None as the checkpoint's tokenizer does it.
            add_eos: Whether `<eos>` comes last (once), as training rows have it.
            allow_special: Whether control tokens spelled in the text (`<end_of_turn>`) become their
                ids. False is for text of users: it is then encoded like any other characters.
                Added tokens that are text (runs of newlines, HTML tags) are found either way.

        Raises:
            TokenizerError: The text has lone surrogates, or a token to add is not in the vocabulary.
        """
        pieces = (
            [text] if allow_special else split_at(text, self._vocabulary.control_tokens.cuts(text))
        )
        ids = self._encode_pieces(pieces)
        if self._vocabulary.adds_bos if add_bos is None else add_bos:
            bos = self._vocabulary.required_id("bos_token")
            if ids[:1] != [bos]:
                ids.insert(0, bos)
        if add_eos:
            eos = self._vocabulary.required_id("eos_token")
            if ids[-1:] != [eos]:
                ids.append(eos)
        return ids

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        padding_side: Literal["left", "right"] = "right",
        add_bos: bool | None = None,
        add_eos: bool = False,
        allow_special: bool = True,
    ) -> BatchEncoding:
        """Encode texts and pad them with `<pad>` to the longest one's length.

        Args:
            texts: B texts.
            padding_side: Where the padding goes; the exported graphs want it on the right.
            add_bos: As for `encode`.
            add_eos: As for `encode`.
            allow_special: As for `encode`.

        Raises:
            TokenizerError: As `encode`; or padding is needed and there is no `<pad>`.
        """
        if padding_side not in {"left", "right"}:
            raise TokenizerError(
                f'padding_side is {shortened(padding_side)}; expected "left" or "right".'
            )
        rows = [
            self.encode(text, add_bos=add_bos, add_eos=add_eos, allow_special=allow_special)
            for text in texts
        ]
        length = max(map(len, rows), default=0)
        needs_padding = any(len(row) < length for row in rows)
        pad = self._vocabulary.required_id("pad_token") if needs_padding else 0
        input_ids = np.full((len(rows), length), pad, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            start = 0 if padding_side == "right" else length - len(row)
            input_ids[index, start : start + len(row)] = row
            attention_mask[index, start : start + len(row)] = 1
        return BatchEncoding(input_ids=input_ids, attention_mask=attention_mask)

    def decode(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TokenizerError: An id is outside the vocabulary, which the backend would drop silently.
        """
        indices = [token_id.__index__() for token_id in ids]
        for index in indices:
            self._vocabulary.token(index)
        return self._backend.decode(indices, skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> StreamingDetokenizer:
        """Return a detokenizer for one text, to be given ids as they come."""
        skipped = self._vocabulary.special_ids if skip_special_tokens else frozenset()
        return StreamingDetokenizer(
            self._vocabulary.token, self._backend.decoder.decode, skipped.__contains__
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Return a conversation as text.

        The text does not tell control tokens that the template wrote from those that a message
        spells: encode conversations with `encode_chat`.

        Args:
            messages: `{"role": ..., "content": ...}` each, the content a string or a list of
                `{"type": "text", "text": ...}`, which becomes one text (nothing is put between the
                parts) for templates that expect strings. A content of None is left out, as in
                transformers. What else is in a message (`tool_calls`, `name`) is for the template.
                Without a template of the checkpoint's own, roles alternate between "user" and
                "assistant" (or "model"), and a "system" message may come first: it is put before
                the first user message's text, as Gemma 3 does.
            tools: JSON schemas of the functions that the model may call, as the template's `tools`.
                What a template does not use has no effect.
            add_generation_prompt: Whether the text ends with the opening of the model's turn.
            continue_final_message: Whether the text ends with the last message, which is the
                assistant's, so that the model goes on with it. `add_generation_prompt` then has no
                effect.

        Raises:
            TokenizerError: Messages or tools are malformed, or hold what is not text (images), or
                the template fails or refuses them.
        """
        return self._chat_template.render(
            self._conversation(messages, tools, add_generation_prompt, continue_final_message)
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Return the token ids of a conversation, with exactly one `<bos>`, in front.

        Control tokens that messages or tools spell (`<end_of_turn>`) stay plain text, also where
        the template changes them first (puts them in lower case, joins them from parts). Only those
        in the assistant's contents stay tokens, as the model writes some of them itself
        (`<start_function_call>`), except those that open or close a text or a turn: no answer has
        them, but one that repeats a user's words can. Where there is nothing to keep as text, the
        ids are those of `apply_chat_template`'s text encoded in one go.

        Args:
            messages: As for `apply_chat_template`.
            tools: As for `apply_chat_template`.
            add_generation_prompt: As for `apply_chat_template`.
            continue_final_message: As for `apply_chat_template`.

        Raises:
            TokenizerError: As `apply_chat_template`; or the text holds control tokens, and the
                template changes what it is given in a way that does not let tell whose they are; or
                there is no template and no turn tokens either.
        """
        missing = self._missing_turn_tokens
        if missing:
            raise TokenizerError(
                f"The vocabulary has no {' and no '.join(missing)}, and the checkpoint brings no "
                "chat template; expected the tokenizer of an instruction-tuned Gemma. Use one, or "
                "give plain prompts instead of a chat."
            )
        pieces = guarded_pieces(
            self._conversation(messages, tools, add_generation_prompt, continue_final_message),
            self._chat_template,
            self._vocabulary.control_tokens,
            self._turn_tokens.framing | self._vocabulary.framing_tokens,
        )
        ids = self._encode_pieces(pieces)
        bos = self.bos_token_id
        if bos is None:
            return ids
        return [bos, *itertools.dropwhile(lambda token_id: token_id == bos, ids)]

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint brings a chat template of its own."""
        return not self._chat_template.is_default

    @property
    def end_of_turn_ids(self) -> frozenset[int]:
        """Ids of the control tokens that the chat template writes right behind an answer.

        `<end_of_turn>` for Gemma's templates, `<|im_end|>` for ChatML. None where the template
        writes text there, or there is no template and the vocabulary has no turn tokens.
        """
        if self._missing_turn_tokens:
            return frozenset()
        ids = map(self.token_to_id, self._turn_tokens.ending)
        return frozenset(token_id for token_id in ids if token_id is not None)

    @property
    def _missing_turn_tokens(self) -> list[str]:
        """The turn tokens that Gemma's own chat template would write, and that are no tokens."""
        if self.has_chat_template:
            return []
        return [token for token in TURN_TOKENS if not self._vocabulary.has(token)]

    @cached_property
    def _turn_tokens(self) -> TurnTokens:
        return find_turn_tokens(self._chat_template, self._vocabulary.control_tokens)

    def _conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> Conversation:
        conversation = Conversation.of(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return contents_as_read(conversation, self._chat_template.render)

    def _encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        try:
            encodings = [self._backend.encode(text, add_special_tokens=False) for text in pieces]
        except TypeError as err:
            if not all(isinstance(text, str) for text in pieces):
                raise
            # The library's message for a str with lone surrogates is that it is not a str.
            raise TokenizerError(
                "The text is not valid Unicode; expected a string without lone surrogates (U+D800 "
                "to U+DFFF). Decode its bytes as UTF-8, with errors='replace' if need be."
            ) from err
        return [token_id for encoding in encodings for token_id in encoding.ids]

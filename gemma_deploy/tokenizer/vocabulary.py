"""The tokens of a tokenizer, and what each is for."""

import itertools
from collections.abc import Mapping
from typing import Final, SupportsIndex

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from gemma_deploy.errors import TokenizerError
from gemma_deploy.quoting import shortened
from gemma_deploy.tokenizer.control_tokens import ControlTokens, normalized, reads_as_control
from gemma_deploy.tokenizer.settings import TokenizerSettings

TURN_TOKENS: Final = ("<start_of_turn>", "<end_of_turn>")

# What the tokens are called where no file says.
_GEMMA_NAMES: Final = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
_END_ROLES: Final = ("bos_token", "eos_token", "pad_token")
_BYTE_TOKENS: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))


class Vocabulary:
    """Ids, roles and kinds of a backend's tokens.

    Attributes:
        named_tokens: The tokens that have a role, by its name.
        bos_token_id, eos_token_id, pad_token_id: None where no token has the role.
        adds_bos: Whether encoding puts `<bos>` in front unless told otherwise: as the backend's post
            processor did, or without one, unless the settings say that it is not added.
        special_ids: The ids that decoding leaves out when it skips special tokens.
        framing_tokens: The control tokens that open or close a text or one of Gemma's turns.
        control_tokens: What text must not turn into unless it may control the model.

    Args:
        backend: Changed: tokens that only the settings call special become so, and the post
            processor adds `<bos>` if `adds_bos`, and nothing else.
        settings: What the backend does not hold.

    Raises:
        TokenizerError: The settings name a token that the backend does not have.
    """

    def __init__(self, backend: Tokenizer, settings: TokenizerSettings) -> None:
        self._backend = backend
        present = {role: name for role, name in _GEMMA_NAMES.items() if self.has(name)}
        self.named_tokens: Mapping[str, str] = {**present, **settings.named_tokens}
        special = [*self.named_tokens.values(), *settings.extra_special_tokens]
        listed = {token.content for token in backend.get_added_tokens_decoder().values()}
        # As in transformers, the flags of tokens that tokenizer.json lists stay what they are.
        # Never a new token: the model has no embedding for it.
        backend.add_special_tokens([t for t in special if t not in listed and self.has(t)])
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        self.pad_token_id = self._named_id("pad_token")
        self.adds_bos = self._adds_bos(settings)
        backend.post_processor = self._post_processor()

        # Gemma 3's files name <end_of_turn> as "eos_token", and do not name <eos>.
        ends = [(_GEMMA_NAMES[role], self.named_tokens.get(role, "")) for role in _END_ROLES]
        self.framing_tokens = frozenset(map(normalized, itertools.chain(TURN_TOKENS, *ends)))
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        control = [t.content for t in added.values() if t.special or reads_as_control(t.content)]
        self.control_tokens = ControlTokens([*control, *special, *TURN_TOKENS, *_BYTE_TOKENS])

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def has(self, token: str) -> bool:
        """Whether there is such a token."""
        return self._backend.token_to_id(token) is not None

    def token(self, token_id: SupportsIndex) -> str:
        """Return the token of an id.

        Raises:
            TokenizerError: The id is outside the vocabulary.
        """
        index = token_id.__index__()
        # The backend takes only what fits 32 unsigned bits.
        token = self._backend.id_to_token(index) if 0 <= index < 2**32 else None
        if token is None:
            raise TokenizerError(
                f"Token id {index} is outside the vocabulary; expected 0 to {self.size - 1}. Check "
                "that the ids come from this tokenizer and a model that belongs to it."
            )
        return token

    def required_id(self, role: str) -> int:
        """Return the id of the token with a role, such as "bos_token".

        Raises:
            TokenizerError: No token has the role.
        """
        token_id = self._named_id(role)
        if token_id is None:
            raise TokenizerError(
                f'The tokenizer has no "{role}", which is needed here; expected '
                "tokenizer_config.json to name one. Name it there."
            )
        return token_id

    def _named_id(self, role: str) -> int | None:
        name = self.named_tokens.get(role)
        if name is None:
            return None
        token_id = self._backend.token_to_id(name)
        if token_id is None:
            raise TokenizerError(
                f'tokenizer_config.json names {shortened(name)} as "{role}", but the vocabulary does '
                "not have it; expected a token of tokenizer.json. Take both files from one checkpoint."
            )
        return token_id

    def _adds_bos(self, settings: TokenizerSettings) -> bool:
        if self._backend.post_processor is None:
            # Gemma was trained with it, and says nothing that makes sense without.
            return self.bos_token_id is not None and settings.add_bos is not False
        return self.bos_token_id in self._backend.encode("").ids[:1]

    def _post_processor(self) -> TemplateProcessing:
        """Return what makes other readers of a saved tokenizer.json add the same tokens."""
        names = [self.named_tokens["bos_token"]] if self.adds_bos else []
        return TemplateProcessing(
            single=[*names, "$A"],
            pair=[*names, "$A", *(f"{name}:1" for name in names), "$B:1"],
            special_tokens=[(name, self._backend.token_to_id(name)) for name in names],
        )

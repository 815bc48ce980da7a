"""What tokenizer_config.json and its companions say."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gemma_deploy.errors import TokenizerError
from gemma_deploy.json_files import read_bytes, read_json
from gemma_deploy.limits import MAX_CONFIG_BYTES, MAX_METADATA_BYTES
from gemma_deploy.quoting import shortened

TOKENIZER_FILE: Final = "tokenizer.json"
TOKENIZER_FILES: Final = (
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "tokenizer.model",
)

# Gemma 3 names more of them: boi_token, eoi_token, image_token.
_ROLES: Final = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSettings:
    """Settings of a tokenizer that tokenizer.json does not hold.

    `add_eos_token` is not among them: it is for training rows.

    Attributes:
        named_tokens: The tokens that have a role, by its name: "bos_token", "eos_token", ...
        extra_special_tokens: Tokens that are special beyond the named ones.
        add_bos: What `add_bos_token` says; it counts only where tokenizer.json has no post processor.
        chat_template: Jinja source; None where there is none.
    """

    named_tokens: Mapping[str, str] = field(default_factory=dict)
    extra_special_tokens: tuple[str, ...] = ()
    add_bos: bool | None = None
    chat_template: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "TokenizerSettings":
        """Read the settings of a folder; files that are not there say nothing.

        Raises:
            TokenizerError: A file is not valid JSON, or a value in it has the wrong type.
        """
        path = folder / "tokenizer_config.json"
        values = {**_read_json(folder / "special_tokens_map.json"), **_read_json(path)}
        named = {
            key: _content(value, key, path)
            for key, value in values.items()
            if key in _ROLES or (key.endswith("_token") and isinstance(value, str | Mapping))
            if value is not None
        }
        return cls(
            named_tokens=named,
            extra_special_tokens=_extra_special_tokens(values, path),
            add_bos=_flag(values, "add_bos_token", path),
            chat_template=_read_chat_template(folder, values, path),
        )

    def write(self, folder: Path) -> None:
        """Write tokenizer_config.json, and chat_template.jinja if there is a template.

        Raises:
            OSError: The folder cannot be written.
        """
        values: dict[str, Any] = {
            "tokenizer_class": "GemmaTokenizer",
            **self.named_tokens,
            "extra_special_tokens": list(self.extra_special_tokens),
            "clean_up_tokenization_spaces": False,
        }
        text = json.dumps(values, ensure_ascii=False, indent=2) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        template = folder / "chat_template.jinja"
        if self.chat_template is not None:
            template.write_bytes(self.chat_template.encode())
        else:
            # One left by an earlier tokenizer would be read as this one's.
            template.unlink(missing_ok=True)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer's files that exist in a folder."""
    return [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]


def _read_template(path: Path) -> str:
    raw = read_bytes(
        path, max_bytes=MAX_CONFIG_BYTES, error=TokenizerError, remedy="download the file again."
    )
    try:
        return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as err:
        raise TokenizerError(f"{path} cannot be read: {err}. Expected a UTF-8 text file.") from err


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no file."""
    if not path.is_file():
        return {}
    return read_json(
        path, max_bytes=MAX_METADATA_BYTES, error=TokenizerError, remedy="download the file again."
    )


def _content(value: object, key: str, path: Path) -> str:
    """Return a token's text, whether written as a string or as a serialized AddedToken."""
    content = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(content, str):
        raise TokenizerError(
            f'{path}: "{key}" is {shortened(value)}; expected a string, or an object with "content".'
        )
    return content


def _extra_special_tokens(values: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    tokens: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = values.get(key) or []
        # transformers 5 also writes {name: token}.
        items = listed.values() if isinstance(listed, Mapping) else listed
        if isinstance(items, str) or not isinstance(items, Iterable):
            raise TokenizerError(
                f'{path}: "{key}" is {shortened(listed)}; expected a list of tokens.'
            )
        tokens += [_content(item, key, path) for item in items]
    return tuple(dict.fromkeys(tokens))


def _flag(values: Mapping[str, Any], key: str, path: Path) -> bool | None:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise TokenizerError(f'{path}: "{key}" is {shortened(value)}; expected true or false.')
    return value


def _read_chat_template(folder: Path, values: Mapping[str, Any], path: Path) -> str | None:
    """Return the template: its own file first, then the config's, then a processor's."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return _read_template(jinja)
    template = values.get("chat_template")
    if template is None:
        path = folder / "chat_template.json"
        template = _read_json(path).get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {str(entry.get("name")): entry.get("template") for entry in template}
    if isinstance(template, dict):
        names = sorted(template)
        template = template.get("default")
        if template is None:
            raise TokenizerError(
                f'{path}: "chat_template" has templates named {shortened(names)}; expected one '
                'named "default". Save the one to use as chat_template.jinja beside it.'
            )
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f'{path}: "chat_template" is a {type(template).__name__}; expected a string or a list '
            'of {"name": ..., "template": ...}.'
        )
    return template

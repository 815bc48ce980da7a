import json
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.errors import TokenizerError
from gemma_deploy.tokenizer.settings import TOKENIZER_FILES, TokenizerSettings, tokenizer_files


def read(folder: Path, config: Any, **others: Any) -> TokenizerSettings:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in others.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return TokenizerSettings.read(folder)


def test_no_files_say_nothing(tmp_path: Path) -> None:
    assert TokenizerSettings.read(tmp_path) == TokenizerSettings()


def test_tokens_as_strings_and_objects(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        {
            "bos_token": "<bos>",
            "eos_token": {"content": "<eos>"},
            "pad_token": None,
            "boi_token": "<start_of_image>",
            "additional_special_tokens": ["<start_of_turn>", {"content": "<end_of_turn>"}],
            "extra_special_tokens": {"image_token": "<image_soft_token>"},
        },
    )
    assert settings.named_tokens == {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "boi_token": "<start_of_image>",
    }
    assert settings.extra_special_tokens == (
        "<start_of_turn>",
        "<end_of_turn>",
        "<image_soft_token>",
    )


def test_config_wins_over_special_tokens_map(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        {"bos_token": "<config>"},
        special_tokens_map={"bos_token": "<map>", "eos_token": "<eos>"},
    )
    assert settings.named_tokens == {"bos_token": "<config>", "eos_token": "<eos>"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "holds a list, expected a JSON object"),
        ({"bos_token": 2}, '"bos_token" is 2; expected a string'),
        ({"add_bos_token": "yes"}, "\"add_bos_token\" is 'yes'; expected true or false"),
        ({"extra_special_tokens": "<x>"}, "expected a list of tokens"),
        ({"extra_special_tokens": 5}, '"extra_special_tokens" is 5; expected a list of tokens'),
        ({"extra_special_tokens": [5]}, '"extra_special_tokens" is 5; expected a string'),
        ({"bos_token": ["x" * 10**6]}, r'"bos_token" is \[\'xxx.*… \(1,000,004 characters\); exp'),
        ({"bos_token": "a\ud800"}, "cannot be read as JSON: a string holds half a character"),
        ({"chat_template": "\ud800"}, "a string holds half a character"),
        ({"chat_template": [{"name": [], "template": "x"}]}, "templates named .*; expected one"),
        ({"chat_template": 3}, '"chat_template" is a int; expected a string or a list'),
        ({"chat_template": ["x"]}, '"chat_template" is a list; expected a string or a list'),
        (
            {"chat_template": [{"name": "rag", "template": "x"}]},
            r"templates named \['rag'\]; expected one named \"default\"",
        ),
    ],
)
def test_wrong_values(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        read(tmp_path, config)


@pytest.mark.parametrize(
    "text", ['{"bos_token": ', "[" * 100_000 + "]" * 100_000, '{"x": ' + "1" * 5000 + "}"]
)
@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "chat_template"])
def test_broken_json(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(TokenizerError, match=rf"{name}\.json cannot be read as JSON: .* again"):
        TokenizerSettings.read(tmp_path)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja cannot be read"):
        TokenizerSettings.read(tmp_path)


class TestChatTemplate:
    def test_string(self, tmp_path: Path) -> None:
        assert read(tmp_path, {"chat_template": "a"}).chat_template == "a"

    def test_named(self, tmp_path: Path) -> None:
        named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
        assert read(tmp_path, {"chat_template": named}).chat_template == "b"

    def test_of_a_processor(self, tmp_path: Path) -> None:
        assert read(tmp_path, {}, chat_template={"chat_template": "a"}).chat_template == "a"

    def test_own_file_wins(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_text("file")
        others = {"chat_template": {"chat_template": "processor"}}
        assert read(tmp_path, {"chat_template": "config"}, **others).chat_template == "file"


def test_files_that_exist(tmp_path: Path) -> None:
    for name in (*TOKENIZER_FILES, "config.json"):
        (tmp_path / name).touch()
    assert {path.name for path in tokenizer_files(tmp_path)} == set(TOKENIZER_FILES)
    (tmp_path / "tokenizer.model").unlink()
    assert tmp_path / "tokenizer.model" not in tokenizer_files(tmp_path)

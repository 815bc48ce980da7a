import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from gemma_deploy.cli.prepacked_option import (
    ENVIRONMENT_VARIABLE,
    cache_folder,
    default_cache_folder,
)
from gemma_deploy.runtime.sessions.prepacked_cache import DATA_FILE, MODEL_FILE, PrepackedCache

Invoke = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own cache, which has one entry of a little over 2 KiB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    folder = tmp_path / "caches" / "gemma-deploy" / "prepacked"

    def fill(staging: Path) -> None:
        (staging / MODEL_FILE).write_bytes(b"model")
        (staging / DATA_FILE).write_bytes(bytes(2048))

    PrepackedCache(folder=folder).write({}, fill, source=Path("/b/prefill.onnx"), need_bytes=1)
    return folder


def test_list_and_clear(folder: Path, invoke: Invoke) -> None:
    listed = invoke("cache", "list")
    assert listed.exit_code == 0
    title, header, row = listed.stdout.splitlines()
    assert re.fullmatch(rf"{re.escape(str(folder))}: 2\.\d\d KiB", title)
    assert header.split() == ["graph", "size", "last", "used"]
    assert re.fullmatch(r"  /b/prefill\.onnx  2\.\d\d KiB  \d{4}-\d\d-\d\d \d\d:\d\d", row)
    assert re.search(r": 2\.\d\d KiB freed$", invoke("cache", "clear").stdout)
    assert invoke("cache", "list").stdout == f"{folder}: empty\n"


def test_list_as_json(folder: Path, invoke: Invoke) -> None:
    listed = json.loads(invoke("cache", "list", "--json").stdout)
    assert listed["folder"] == str(folder)
    (entry,) = listed["entries"]
    assert entry["source"] == "/b/prefill.onnx"
    assert entry["size_bytes"] > 2048
    assert Path(entry["path"]).parent == folder


def test_another_folder_and_the_environment(
    folder: Path, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    assert invoke("cache", "list", "--prepacked-cache", other).stdout == f"{other}: empty\n"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(other))
    assert invoke("cache", "list").stdout == f"{other}: empty\n"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
    assert invoke("cache", "list").stdout.startswith(f"{folder}: 2.")


def test_what_the_option_means(folder: Path) -> None:
    assert cache_folder("off") is None
    assert cache_folder("auto") == folder
    assert cache_folder("some/where") == Path("some/where")


@pytest.mark.parametrize(
    ("platform", "environment", "base"),
    [
        ("linux", {"XDG_CACHE_HOME": "/var/c"}, Path("/var/c")),
        ("linux", {"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache"),
        ("linux", {"XDG_CACHE_HOME": ""}, Path.home() / ".cache"),
        ("linux", {}, Path.home() / ".cache"),
        ("darwin", {"XDG_CACHE_HOME": "/var/c"}, Path.home() / "Library" / "Caches"),
        ("win32", {"LOCALAPPDATA": "/local"}, Path("/local")),
        ("win32", {}, Path.home() / "AppData" / "Local"),
    ],
)
def test_the_users_folder(platform: str, environment: dict[str, str], base: Path) -> None:
    assert default_cache_folder(environment, platform) == base / "gemma-deploy" / "prepacked"


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_verbs_hand_the_folder_on(
    verb: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def load(*_: object, prepacked_cache: Path | None, **__: object) -> None:
        given.append(prepacked_cache)
        raise NotADirectoryError  # that is enough

    monkeypatch.setattr("gemma_deploy.api.load", load)
    invoke(verb, "bundle", "--prepacked-cache", "kept", input="hello")
    invoke(verb, "bundle", input="hello")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "from-environment")
    invoke(verb, "bundle", input="hello")
    assert given == [Path("kept"), None, Path("from-environment")]

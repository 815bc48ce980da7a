from pathlib import Path

import pytest

import gemma_deploy
from gemma_deploy.errors import RequestError
from gemma_deploy.user_paths import user_path


def test_home_folders_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/models") == Path("/home/me/models")
    assert user_path(Path("here")) == Path("here")


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(RequestError, match=r"~nobody-at-all/x cannot be found: "):
        gemma_deploy.load("~nobody-at-all/x")

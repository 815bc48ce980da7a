"""Install lines, read from metadata as pip writes it."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from gemma_deploy.install_hint import install_line


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the metadata's folder of a gemma-deploy that comes before the real one."""
    folder = tmp_path / "site" / "gemma_deploy-0.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: gemma-deploy\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def _state_origin(site: Path, **origin: Any) -> None:
    (site / "direct_url.json").write_text(json.dumps(origin))


@pytest.mark.parametrize("name", ["clone", "a clone"])
def test_from_a_clone_that_is_there(site: Path, tmp_path: Path, name: str) -> None:
    clone = tmp_path / name
    clone.mkdir()
    (clone / "pyproject.toml").touch()
    _state_origin(site, url=clone.as_uri(), dir_info={})

    assert install_line("hub") == f'pip install "{clone}[hub]"'
    assert install_line("hub", "--upgrade") == f'pip install --upgrade "{clone}[hub]"'
    quoted = f'"{clone}"' if " " in name else str(clone)
    assert install_line() == f"pip install {quoted}"


def test_an_editable_one_stays_editable(site: Path, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    _state_origin(site, url=tmp_path.as_uri(), dir_info={"editable": True})

    assert install_line("hub") == f'pip install --editable "{tmp_path}[hub]"'


@pytest.mark.parametrize(
    "origin",
    [
        {"url": "file:///no/such/clone", "dir_info": {}},
        {"url": "file:///tmp/gemma_deploy-0.1.0-py3-none-any.whl", "archive_info": {}},
        {"url": "https://example.org/gemma-deploy.git", "vcs_info": {"vcs": "git"}},
        {"url": 5, "dir_info": None},
        {},
    ],
)
def test_from_elsewhere(site: Path, origin: dict[str, Any]) -> None:
    _state_origin(site, **origin)

    assert (
        install_line("tensorrt-rtx") == 'pip install ".[tensorrt-rtx]" in a clone of gemma-deploy'
    )
    assert install_line() == "pip install . in a clone of gemma-deploy"


@pytest.mark.parametrize("content", ["no JSON", "[1]", None])
def test_metadata_that_says_nothing(site: Path, content: str | None) -> None:
    if content is not None:
        (site / "direct_url.json").write_text(content)

    assert install_line("hub") == 'pip install ".[hub]" in a clone of gemma-deploy'


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)

    assert install_line("hub") == 'pip install ".[hub]" in a clone of gemma-deploy'

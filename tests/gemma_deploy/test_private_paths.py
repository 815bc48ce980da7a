import os
from pathlib import Path

import pytest

from gemma_deploy.private_paths import others_access, others_access_above

NOBODY = 65534


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "above" / "cache"
    folder.mkdir(parents=True)
    for path in (folder, folder.parent):
        path.chmod(0o755)
    return folder


def give_away(path: Path) -> None:
    try:
        os.chown(path, NOBODY, NOBODY)
    except PermissionError:
        pytest.skip("only root may give files away")


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o500])
def test_what_only_its_owner_writes(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    assert others_access(folder) is None
    assert others_access_above(folder) is None
    assert others_access(folder / "missing") is None


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702, 0o1777])
def test_what_others_may_write(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    assert others_access(folder) == f"{folder} may be written by other users (mode {mode:o})"


def test_what_belongs_to_another_user(folder: Path) -> None:
    give_away(folder)
    assert others_access(folder) == f"{folder} belongs to another user (uid {NOBODY})"


def test_links(folder: Path) -> None:
    (folder / "link").symlink_to(folder)
    assert others_access(folder / "link") == f"{folder / 'link'} is a symbolic link"


def test_who_may_rename_the_folder(folder: Path) -> None:
    above = folder.parent
    above.chmod(0o777)
    assert others_access_above(folder) == f"{above} may be written by other users (mode 777)"
    above.chmod(0o1777)  # as /tmp: only owners rename
    assert others_access_above(folder) is None
    give_away(above)  # the owner of a sticky folder renames all
    assert others_access_above(folder) == f"{above} belongs to another user (uid {NOBODY})"

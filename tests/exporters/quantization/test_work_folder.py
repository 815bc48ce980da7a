import contextlib
import fcntl
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_deploy.errors import ExportError, GemmaDeployWarning
from gemma_deploy.exporters.quantization import work_folder
from gemma_deploy.exporters.quantization.work_folder import WorkFolder
from gemma_deploy.staging import Lock, locked

GPTQ, AWQ = {"method": "gptq"}, {"method": "awq"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.calibration"


def is_held_by_another_export(path: Path, key: dict[str, str]) -> bool:
    try:
        WorkFolder(path, key).close()
    except ExportError as err:
        message = f"another export is at work in {path}, where calibration keeps what it has done"
        assert str(err).startswith(message)  # noqa: PT017 - whether it is raised is the result
        return True
    return False


@pytest.mark.parametrize("key", [GPTQ, AWQ])
def test_one_export_at_a_time_and_nothing_of_it_is_lost(path: Path, key: dict[str, str]) -> None:
    work = WorkFolder(path, GPTQ)
    saved = work.save("layer-0", {"x": torch.zeros(2)})
    assert is_held_by_another_export(path, key)
    assert work.find("layer-0") == saved
    work.close()
    assert not is_held_by_another_export(path, key)


def test_a_run_of_the_same_key_is_taken_up(path: Path) -> None:
    work = WorkFolder(path, GPTQ)
    work.save("layer-0", {"x": torch.ones(2)})
    with pytest.raises(KeyboardInterrupt), work:
        raise KeyboardInterrupt
    found = WorkFolder(path, GPTQ).find("layer-0")
    assert found is not None
    assert load_file(found)["x"].tolist() == [1, 1]


def test_windows_flushes_a_file_that_it_may_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    with WorkFolder(path, GPTQ) as work:
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr(
            os,
            "fsync",
            lambda handle: modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE),
        )
        work.save("layer-0", {"x": torch.zeros(2)})
        monkeypatch.undo()
    assert modes == [os.O_RDWR]


def test_what_another_key_left_is_removed(path: Path) -> None:
    work = WorkFolder(path, GPTQ)
    work.save("layer-0", {"x": torch.ones(2)})
    (path / "sub").mkdir()
    work.close()
    with WorkFolder(path, AWQ) as work:
        assert [x.name for x in path.iterdir()] == ["calibration.json"]
    assert not path.exists()


def test_a_folder_that_nobody_refers_to_is_free(path: Path) -> None:
    WorkFolder(path, GPTQ)
    gc.collect()
    assert not is_held_by_another_export(path, AWQ)


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from gemma_deploy.exporters.quantization.work_folder import WorkFolder
from gemma_deploy.staging import Lock, locked
work = WorkFolder(Path(sys.argv[1]), {"method": "gptq"})
work.save("layer-0", {"x": torch.zeros(2)})
print("ready", flush=True)
signal.pause()
"""


def test_another_process_and_its_death(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_held_by_another_export(path, AWQ)
        assert is_held_by_another_export(path, GPTQ)
        process.send_signal(signal.SIGKILL)
    assert WorkFolder(path, GPTQ).find("layer-0") is not None


def test_removing_what_is_gone(path: Path) -> None:
    work = WorkFolder(path, GPTQ)
    for entry in path.iterdir():
        entry.unlink()
    path.rmdir()
    work.remove()
    work.remove()
    assert not path.exists()


def test_what_cannot_be_removed_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WorkFolder(path, GPTQ)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.warns(GemmaDeployWarning, match=re.escape(f"{path}, which calibration needs no")):
        work.remove()


def test_a_folder_removed_before_it_was_locked_is_made_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def remove_first(folder: Path) -> Iterator[Lock]:
        monkeypatch.setattr(work_folder, "locked", locked)
        folder.rmdir()
        with locked(folder) as lock:
            yield lock

    monkeypatch.setattr(work_folder, "locked", remove_first)
    work = WorkFolder(path, GPTQ)
    assert path.is_dir()
    assert is_held_by_another_export(path, GPTQ)
    work.remove()


def test_what_others_keep_there(path: Path) -> None:
    path.mkdir()
    (path / "letters").touch()
    with pytest.raises(ExportError, match="holds something else: move it away, or choose another"):
        WorkFolder(path, GPTQ)
    assert [x.name for x in path.iterdir()] == ["letters"]


def test_the_key_is_stated(path: Path) -> None:
    WorkFolder(path, GPTQ)
    assert json.loads((path / "calibration.json").read_text()).keys() == {"sha256"}

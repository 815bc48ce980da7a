import hashlib
import os
from pathlib import Path

import pytest

from gemma_deploy.file_records import sha256_of


def test_progress_is_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    counts: list[int] = []
    assert sha256_of(tmp_path / "file", counts.append) == hashlib.sha256(b"0123456789").hexdigest()
    assert sum(counts) == 10


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is no regular file"):
        sha256_of(tmp_path / "pipe")

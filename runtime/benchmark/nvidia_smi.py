"""What the NVIDIA driver's own program says: `ask_nvidia_smi`.

https://docs.nvidia.com/deploy/nvidia-smi/. Nothing here has run on hardware yet.
"""

import shutil
import subprocess
from typing import Final

_TIMEOUT_S: Final = 20


def ask_nvidia_smi(*arguments: str) -> list[str] | None:
    """Return the lines of an answer; None where the program is missing, fails or takes too long."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(  # noqa: S603 - a program of the driver, with arguments of our own
            [program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()

"""The models that ours and the rivals run, made once and kept: `RivalModels`."""

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

from benchmarks.random_tokenizer import write_tokenizer
from benchmarks.rival_contenders import ModelKind
from benchmarks.shapes import shape_config, write_random_checkpoint

ROOT: Final = Path(__file__).parents[1]
_EXPORTER: Final = ("gemma_deploy", "exporters")
_GENAI_OPTIONS: Final = {"genai": ["prune_lm_head=true", "block_size=128"], "genai-default": []}
_SHOWN_CHARACTERS: Final = 3000


class RivalModels:
    """A folder with a random checkpoint of one shape and its conversions.

    Each is made when it is first asked for, by a process of its own, and appears whole or not at all.
    """

    def __init__(self, folder: Path, shape: str, rivals_python: Path) -> None:
        """Begin in `folder`/`shape`, which need not exist.

        Args:
            folder: Where models are kept.
            shape: Which checkpoint, a name in `benchmarks.shapes.SHAPES`.
            rivals_python: The interpreter that converts for the rivals.
        """
        self._folder = (folder / shape).resolve()
        self._shape = shape
        self._python = str(rivals_python)

    def of(self, kind: ModelKind) -> Path:
        """Return what a rival runs.

        Raises:
            SystemExit: Its conversion failed.
        """
        match kind:
            case "checkpoint":
                return self._kept("checkpoint", self._write_checkpoint)
            case "gguf":
                module = "benchmarks.rival_programs.write_gguf"
                checkpoint = self.of("checkpoint")
                return self._kept(
                    "q4_0.gguf",
                    lambda target: _run([self._python, "-m", module, checkpoint, target]),
                )
            case "genai" | "genai-default":
                return self._genai(kind)

    def bundle(self, export_options: str) -> Path:
        """Return ours: exported again when the options or the exporter changed since.

        Raises:
            SystemExit: The export failed.
        """
        options = shlex.split(export_options)
        sources = sha256()
        for file in sorted(f for room in _EXPORTER for f in (ROOT / room).rglob("*.py")):
            sources.update(file.read_bytes())
        prefix = f"bundle-{sha256(repr(options).encode()).hexdigest()[:8]}-"
        name = f"{prefix}{sources.hexdigest()[:8]}"
        for outdated in self._folder.glob(f"{prefix}*"):
            if outdated.name != name:
                shutil.rmtree(outdated)
        checkpoint = self.of("checkpoint")
        return self._kept(
            name,
            lambda target: _run([*OURS_COMMAND, "export", checkpoint, "-o", target, *options]),
        )

    def _write_checkpoint(self, target: Path) -> None:
        target.mkdir()
        config = shape_config(self._shape)
        write_random_checkpoint(target, config)
        write_tokenizer(target, config.vocab_size)

    def _genai(self, kind: ModelKind) -> Path:
        checkpoint, options = self.of("checkpoint"), _GENAI_OPTIONS[kind]
        extra = ["--extra_options", *options] if options else []

        def make(target: Path) -> None:
            builder = [self._python, "-m", "onnxruntime_genai.models.builder"]
            cache = target.with_name("builder-cache")
            places: list[str | Path] = ["-i", checkpoint, "-o", target, "-c", cache]
            _run([*builder, *places, "-p", "int4", "-e", "cpu", *extra])
            shutil.rmtree(cache, ignore_errors=True)

        return self._kept("-".join([kind, "int4"]), make)

    def _kept(self, name: str, make: Callable[[Path], None]) -> Path:
        target = self._folder / name
        if target.exists():
            return target
        print(f"making {target} ...", file=sys.stderr, flush=True)
        started_s = time.perf_counter()
        partial = self._folder / "partial" / name
        shutil.rmtree(partial.parent, ignore_errors=True)
        partial.parent.mkdir(parents=True)
        make(partial)
        partial.rename(target)
        print(f"  done in {time.perf_counter() - started_s:.0f} s", file=sys.stderr, flush=True)
        return target


OURS_COMMAND: Final = (sys.executable, "-m", "gemma_deploy")
"""`gemma-deploy`, run from this checkout."""


def _run(command: Sequence[str | Path]) -> None:
    """Run a conversion in the repository's root.

    Raises:
        SystemExit: It failed.
    """
    done = subprocess.run(  # noqa: S603 - our own command lines
        [str(part) for part in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        line = shlex.join(str(part) for part in command)
        raise SystemExit(
            f"{line}\nfailed with exit code {done.returncode}:\n{done.stdout[-_SHOWN_CHARACTERS:]}"
        )

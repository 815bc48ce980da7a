"""Compare the memory that `gemma-deploy inspect` says with what a run takes, format by format.

    python -m benchmarks.inspect_memory CHECKPOINT [--format int4] [--tokens 1024] [--bundles FOLDER]

CHECKPOINT is exported to each format, and each bundle loaded by a fresh process, which reads a prompt
of all but 16 of the tokens and generates the rest: without a prepacked cache, when the cache is written,
and with it. Memory is private memory (RssAnon of /proc, so Linux only), looked at every 5 ms: its
peak, and what is left at the end. With --bundles exports are kept there, and taken from there the next
time; otherwise scratch files are removed. The exit code is 1 if any figure is more than 15 % off. The
last line of stdout is one JSON object.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from benchmarks.arguments import whole_number
from benchmarks.rival_processes import run_turn
from gemma_deploy.inspection import inspect_folder
from gemma_deploy.memory import MemoryEstimate
from gemma_deploy.runtime.generator import PREFILL_CHUNK_TOKENS

FORMATS: Final = MappingProxyType(
    {
        "fp32": ("--fp32",),
        "fp16": ("--fp16", "--no-calibration"),
        "bf16": ("--bf16",),
        "int8": ("--int8",),
        "int4": ("--int4",),
        "nf4": ("--nf4",),
        "fp32-int8-cache": ("--fp32", "--cache-dtype", "int8"),
        "int4-int8-cache": ("--int4", "--cache-dtype", "int8"),
    }
)
"""Options of `gemma-deploy export`."""
GOAL_PERCENT: Final = 15
_INTERVAL_S: Final = 0.005
_NEW_TOKENS: Final = 16
_RUN = """
import json, re, sys
from pathlib import Path
import gemma_deploy
folder, tokens, new_tokens, cache = sys.argv[1:]
with gemma_deploy.load(folder, device="cpu", max_seq_len=int(tokens), prepacked_cache=cache or None) as model:
    ids = model.tokenizer.encode("The river has many names. " * int(tokens))
    text = model.tokenizer.decode(ids[1 : int(tokens) - int(new_tokens)])
    options = gemma_deploy.GenerationOptions(max_new_tokens=int(new_tokens), temperature=0)
    result = model.generate([text], options)[0]
    status = Path("/proc/self/status").read_text()
    kept_bytes = 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1])
print(json.dumps({"kept_bytes": kept_bytes, "prompt_tokens": len(result.prompt_token_ids)}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What was said of a run, and what it took.

    Attributes:
        name: The format.
        cache: `none`, or whether a prepacked cache is `written` or `read`.
        said_peak_bytes: Private memory at its peak, by the estimate.
        peak_bytes: The same, measured.
        said_kept_bytes: Private memory at the end, by the estimate; None where it says nothing.
        kept_bytes: The same, measured.
    """

    name: str
    cache: str
    said_peak_bytes: int
    peak_bytes: int
    said_kept_bytes: int | None
    kept_bytes: int

    @property
    def ratios(self) -> tuple[float, ...]:
        """Said to measured: of the peak, and of what is kept."""
        peak = self.said_peak_bytes / self.peak_bytes
        return (
            (peak,)
            if self.said_kept_bytes is None
            else (peak, self.said_kept_bytes / self.kept_bytes)
        )

    @property
    def is_near(self) -> bool:
        """Whether what was said is within the goal."""
        return all(abs(ratio - 1) <= GOAL_PERCENT / 100 for ratio in self.ratios)


def readings(name: str, bundle: Path, tokens: int) -> Iterator[Reading]:
    """Run a bundle three times: without a prepacked cache, writing one, and with it."""
    said = inspect_folder(bundle).estimate(
        batch_size=1, max_seq_len=tokens, prefill_tokens=PREFILL_CHUNK_TOKENS
    )
    with tempfile.TemporaryDirectory(dir=bundle.parent, prefix="prepacked-") as folder:
        for cache in ("none", "written", "read"):
            place = "" if cache == "none" else folder
            arguments = [str(bundle), str(tokens), str(_NEW_TOKENS), place]
            turn = run_turn(
                [sys.executable, "-c", _RUN, *arguments], str(bundle), interval_s=_INTERVAL_S
            )
            kept_bytes, peak_bytes = turn.figures["kept_bytes"], turn.memory.peak_anonymous_bytes
            if peak_bytes is None:
                raise SystemExit("private memory is read from /proc, which is not here")
            said_peak, said_kept = _said(said, cache)
            yield Reading(
                name=name,
                cache=cache,
                said_peak_bytes=said_peak,
                peak_bytes=max(peak_bytes, kept_bytes),
                said_kept_bytes=said_kept,
                kept_bytes=kept_bytes,
            )


def _said(said: MemoryEstimate, cache: str) -> tuple[int, int | None]:
    """Return what an estimate says of peak and end."""
    match cache:
        case "none":
            return said.cpu_peak_bytes, said.cpu_total_bytes
        case "written":  # what packing leaves behind is free, but not always given back
            return said.prepacked_writing_bytes, None
        case _:
            return said.prepacked_peak_bytes, said.prepacked_total_bytes


def exported(checkpoint: Path, name: str, folder: Path) -> Path:
    """Return the bundle of a format, which is exported if it is not there yet.

    Raises:
        SystemExit: The export failed.
    """
    bundle = folder / name
    if not bundle.is_dir():
        command = [
            sys.executable,
            "-m",
            "gemma_deploy",
            "export",
            str(checkpoint),
            "-o",
            str(bundle),
        ]
        if subprocess.run([*command, *FORMATS[name]], check=False, stdout=sys.stderr).returncode:  # noqa: S603 - this file's own command line
            raise SystemExit(f"the export of {name} failed")
    return bundle


def _line(reading: Reading) -> str:
    mib = 1 << 20
    kept = reading.said_kept_bytes
    figures = f"{reading.said_peak_bytes / mib:10.0f} {reading.peak_bytes / mib:8.0f} {reading.ratios[0]:6.2f}"
    if kept is not None:
        figures += f" {kept / mib:10.0f} {reading.kept_bytes / mib:8.0f} {reading.ratios[1]:6.2f}"
    return f"{reading.name:>16} {reading.cache:>8} {figures}{'' if reading.is_near else '  OFF'}"


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--format", choices=FORMATS, action="append", help="repeatable")
    parser.add_argument(
        "--tokens", type=whole_number, default=1024, help="prompt and answer together"
    )
    parser.add_argument("--bundles", type=Path, help="where exports are kept (default: nowhere)")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print a table in MiB and a line of JSON."""
    arguments = _arguments(words)
    found: list[Reading] = []
    with contextlib.ExitStack() as stack:
        folder = arguments.bundles
        if folder is None:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="inspect-memory-"))
            )
        print(
            f"{'':>16} {'prepack.':>8} {'peak: said':>10} {'measured':>8} {'ratio':>6} "
            f"{'kept: said':>10} {'measured':>8} {'ratio':>6}"
        )
        for name in arguments.format or FORMATS:
            bundle = exported(arguments.checkpoint, name, folder)
            for reading in readings(name, bundle.resolve(), arguments.tokens):
                found.append(reading)
                print(_line(reading), flush=True)
    is_met = all(reading.is_near for reading in found)
    body = {"tokens": arguments.tokens, "goal_percent": GOAL_PERCENT, "is_goal_met": is_met}
    print(json.dumps(body | {"readings": [asdict(reading) for reading in found]}))
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()

"""What every rival's program does: parse its arguments, run the case, print one JSON object.

Runs inside the rivals' environment; needs numpy alone. A round is a prompt of random tokens and greedy
tokens after it, at batch 1, ends of text ignored; picking a token counts as part of its step.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a program is to run.

    Attributes:
        model: The model's file or folder, in the rival's own format.
        prompt: Token ids.
        new_tokens: Tokens to generate, the first included.
        threads: Threads of the kernels.
        repeats: Rounds to time, after one that is not timed.
        settings: What else the rival is told, by name.
    """

    model: Path
    prompt: list[int]
    new_tokens: int
    threads: int
    repeats: int
    settings: dict[str, str]


class Rival(Protocol):
    """A loaded model."""

    def begin(self) -> None:
        """Forget the last round; what this takes is not timed."""

    def prefill(self) -> None:
        """Run the prompt and pick the first new token."""

    def step(self) -> None:
        """Run the last token and pick the next one."""


def read_job() -> Job:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", default=[])
    args = parser.parse_args()
    # Below are marks and bytes.
    prompt = np.random.default_rng(0).integers(300, args.vocab_size, args.prompt_tokens)
    return Job(
        model=args.model,
        prompt=prompt.tolist(),
        new_tokens=args.new_tokens,
        threads=args.threads,
        repeats=args.repeats,
        settings=dict(setting.split("=", 1) for setting in args.set),
    )


def run(load: Callable[[Job], Rival], packages: tuple[str, ...]) -> None:
    """Load the model, time it, and print what it took as the last line of stdout.

    Args:
        load: Imports the library and returns the model; the time it takes is reported.
        packages: Whose versions are reported.
    """
    job = read_job()
    offer_to_out_of_memory_killer()
    started_s = time.perf_counter()
    rival = load(job)
    load_s = time.perf_counter() - started_s
    rounds = [_round(rival, job.new_tokens) for _ in range(job.repeats + 1)]
    versions = {package: metadata.version(package) for package in packages}
    print(json.dumps({"load_s": load_s, "rounds": rounds[1:], "versions": versions}))


def offer_to_out_of_memory_killer() -> None:
    """Let the system kill this process rather than the benchmark."""
    score = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError):  # a container may forbid it
        score.write_text("600", encoding="ascii")


def _round(rival: Rival, new_tokens: int) -> dict[str, object]:
    rival.begin()
    times = [time.perf_counter()]
    rival.prefill()
    times.append(time.perf_counter())
    for _ in range(new_tokens - 1):
        rival.step()
        times.append(time.perf_counter())
    taken = np.diff(times).tolist()
    return {"ttft_s": taken[0], "step_s": taken[1:]}

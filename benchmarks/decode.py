"""Measure what the generation loop costs outside the session, as a share of a decode step.

Everything but `Session.step` counts as the loop: choosing tokens, stopping, turning them into text.
The goal is under 5 % of a step at the shape of Gemma 3 270M (V 256,000; a step is about 25 ms in
float32 on two cores). Prompts are random tokens and ends of text are ignored. Random weights give
nearly equal probabilities, where top-p without top-k sorts the whole vocabulary; peaked ones cost a
tenth of that. The last line of stdout is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_deploy.api import load
from gemma_deploy.runtime.generator import BatchGeneration
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions.session import Session
from gemma_deploy.runtime.text_generator import TextGenerator

GOAL_SHARE = 0.05
METHODS = {
    "greedy": {},
    "top-k 64, top-p 0.95": {"top_k": 64, "top_p": 0.95},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 1": {"temperature": 1.0},
    "greedy, penalty 1.1": {"repetition_penalty": 1.1},
}


@dataclass
class TimedSession:
    """A session that adds up the time of its steps."""

    session: Session
    step_s: float = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Run and time one step."""
        started_s = time.perf_counter()
        logits = self.session.step(*args, **kwargs)
        self.step_s += time.perf_counter() - started_s
        return logits


@dataclass(frozen=True)
class Reading:
    """Medians over the rounds, in milliseconds per step of the batch."""

    method: str
    step_ms: float
    loop_ms: float

    @property
    def share(self) -> float:
        """What the loop costs, as a share of a step."""
        return self.loop_ms / self.step_ms


def measure(
    generator: TextGenerator, method: str, args: argparse.Namespace, prompts: list[list[int]]
) -> Reading:
    """Time one sampling method; the first token, which prefill pays for, is left out."""
    options = GenerationOptions(max_new_tokens=args.new_tokens + 1, seed=0, **METHODS[method])  # type: ignore[arg-type]  # fields of several types
    steps_ms, loops_ms = [], []
    for _ in range(args.rounds):
        timed: Any = TimedSession(generator.session)
        cache = timed.new_cache(len(prompts), args.prompt_tokens + args.new_tokens + 1)
        batch = BatchGeneration(timed, cache, prompts, options)
        text = detokenized(generator, batch)
        next(text)
        timed.step_s = 0.0
        started_s = time.perf_counter()
        for _ in text:
            pass
        total_s = time.perf_counter() - started_s
        steps_ms.append(timed.step_s * 1e3 / args.new_tokens)
        loops_ms.append((total_s - timed.step_s) * 1e3 / args.new_tokens)
    return Reading(method, statistics.median(steps_ms), statistics.median(loops_ms))


def detokenized(generator: TextGenerator, batch: BatchGeneration) -> Iterator[str]:
    """Yield the first row's pieces of text, as a stream does."""
    detokenizer = generator.tokenizer.stream()
    for _ in batch.steps():
        token_id = batch.rows[0].last_token
        yield detokenizer.push(token_id % generator.tokenizer.vocab_size)


def main() -> None:
    """Measure every method and print a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="a bundle folder, or a checkpoint folder (torch)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="tokens per prompt (64)")
    parser.add_argument("--new-tokens", type=int, default=32, help="steps to time (32)")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts at a time (1)")
    parser.add_argument("--threads", type=int, help="threads of the kernels (one per core)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are shown (3)")
    args = parser.parse_args()
    with load(args.bundle, device="cpu", threads=args.threads) as generator:
        shape = (args.batch_size, args.prompt_tokens)
        random = np.random.default_rng(0)
        prompts = random.integers(8, generator.config.vocab_size, shape).tolist()
        readings = [measure(generator, method, args, prompts) for method in METHODS]
    print(f"{'method':28} {'step ms':>9} {'loop ms':>9} {'share':>7}")
    for reading in readings:
        columns = f"{reading.step_ms:9.2f} {reading.loop_ms:9.3f} {reading.share:7.1%}"
        print(f"{reading.method:28} {columns}")
    figures = {
        reading.method: {
            "step_ms": round(reading.step_ms, 3),
            "loop_ms": round(reading.loop_ms, 4),
            "share": round(reading.share, 4),
        }
        for reading in readings
    }
    missed = [reading.method for reading in readings if reading.share >= GOAL_SHARE]
    print(json.dumps({"goal_share": GOAL_SHARE, "missed_by": missed, "methods": figures}))


if __name__ == "__main__":
    main()

"""Run rounds of one model with whatever gemma_deploy is on the path: the child of guard.py.

It uses little of the package, in the oldest form there is, so that old commits can be measured too.
The first line of stdout says which files the package's modules came from; then each line of stdin runs a round, which
is answered with a JSON object: `prefill_s`, and `decode_s` for all tokens after the first. It ends
when stdin does.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from gemma_deploy.runtime.generator import BatchGeneration
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions.registry import create_session
from gemma_deploy.runtime.source import ModelSource


def main() -> None:
    """Load the model, then serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    session = create_session(ModelSource.open(args.model), device="cpu", threads=args.threads)
    cache = session.new_cache(1, args.prompt_tokens + args.new_tokens)
    vocab_size = session.config.vocab_size
    prompt = np.random.default_rng(0).integers(vocab_size // 2, vocab_size, args.prompt_tokens)
    options = GenerationOptions(max_new_tokens=args.new_tokens)
    names = [name for name in sys.modules if name.partition(".")[0] == "gemma_deploy"]
    print(json.dumps({"modules": [sys.modules[name].__file__ for name in names]}), flush=True)
    for _ in sys.stdin:
        steps = BatchGeneration(session, cache, [prompt.tolist()], options).steps()
        started_s = time.perf_counter()
        next(steps)
        first_s = time.perf_counter()
        for _ in steps:
            pass
        times = {"prefill_s": first_s - started_s, "decode_s": time.perf_counter() - first_s}
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()

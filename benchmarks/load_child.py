"""One turn of benchmarks.load: `load_child BUNDLE CACHE THREADS STARTED`, the cache perhaps empty.

STARTED is what `time.monotonic` was before this process; the last line of stdout is a JSON object.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Load, generate a token, and print what it took."""
    bundle, cache, threads, process_started_s = sys.argv[1:]
    import gemma_deploy

    started_s = time.monotonic()
    generator = gemma_deploy.load(
        bundle, device="cpu", threads=int(threads), prepacked_cache=Path(cache) if cache else None
    )
    load_s = time.monotonic() - started_s
    with generator:
        next(iter(generator.stream("Once upon a time", max_new_tokens=1)))
        first_token_s = time.monotonic() - float(process_started_s)
        from gemma_deploy.runtime.benchmark.process_memory import read_memory

        memory = read_memory()
        figures = {
            "load_s": load_s,
            "first_token_s": first_token_s,
            "cpu_s": time.process_time(),
            "private_mb": (memory.anonymous_bytes or 0) / 1e6,
            "peak_mb": (memory.peak_bytes or 0) / 1e6,
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

"""Continue prompts: one streamed, then a batch, greedy and sampled. Run 01_export.py first.

usage: python samples/02_generate.py [BUNDLE]
"""

import sys

import gemma_deploy
from gemma_deploy.errors import GemmaDeployError

PROMPTS = ["The for statement is used to", "Return a list of", "Raised when"]


def main() -> None:
    """Generate with the bundle given, by default build/tiny-gemma-bundle."""
    path = sys.argv[1] if len(sys.argv) > 1 else "build/tiny-gemma-bundle"
    with gemma_deploy.load(path) as model:
        print(PROMPTS[0], end="", flush=True)
        stream = model.stream(PROMPTS[0], max_new_tokens=40)
        for piece in stream:
            print(piece, end="", flush=True)
        timings = stream.result.timings
        print(f"\n[{timings.decode_tokens_per_s:.0f} tokens/s]\n")

        for result in model.generate(
            PROMPTS, max_new_tokens=20, temperature=0.7, top_p=0.9, seed=0
        ):
            print(f"{result.prompt!r} -> {result.text!r} ({result.finish_reason})")


if __name__ == "__main__":
    try:
        main()
    except GemmaDeployError as err:
        sys.exit(f"{err}\nThe bundle that these samples use is written by 01_export.py.")

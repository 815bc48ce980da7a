"""Export the small model that comes with the repository: checkpoint folder -> bundle folder.

usage: python samples/01_export.py [BUNDLE]
"""

import sys
from pathlib import Path

import gemma_deploy
from gemma_deploy.errors import GemmaDeployError

CHECKPOINT = Path(__file__).parent / "tiny-gemma"


def main() -> None:
    """Export to the folder given, by default build/tiny-gemma-bundle."""
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "build/tiny-gemma-bundle")
    bundle = gemma_deploy.export(CHECKPOINT, output, dtype="float16", force=True)
    precision = bundle.manifest.precision
    print(f"{bundle.folder}: weights in {precision.weights}, KV cache in {precision.cache}")
    for name, record in bundle.manifest.files.items():
        print(f"{record.size_bytes:>10,} bytes  {name}")


if __name__ == "__main__":
    try:
        main()
    except GemmaDeployError as err:
        sys.exit(str(err))

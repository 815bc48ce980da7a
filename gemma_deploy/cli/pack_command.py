"""`gemma-deploy pack`: an engine becomes a folder to ship."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gemma_deploy.byte_sizes import format_bytes
from gemma_deploy.cli.console import emit_json, progress, say
from gemma_deploy.cli.outputs import announce_new_folders

if TYPE_CHECKING:
    from gemma_deploy.tensorrt import Flavour


@click.command(
    "pack",
    short_help="Copy an engine, with all it needs to generate, into a folder to ship.",
    epilog="""\b
Examples:
  gemma-deploy pack gemma-2b --backend tensorrt-rtx --output gemma-2b-rtx
  gemma-deploy generate gemma-2b-rtx "Once upon a time"

The device needs the very version of the library that built the engine (engine.json states it), and
no torch: docs/tensorrt.md has the install lines.
""",
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "tensorrt-rtx"]),
    required=True,
    help="The library that the engine was built with.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="The folder to create. It appears whole or not at all; folders above it are made.",
)
@click.option(
    "--engine",
    "key",
    metavar="KEY",
    help="Name of the engine's folder in BUNDLE/engines. [default: the only one]",
)
@click.option("--force", is_flag=True, help="Replace the engine at DIR if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with path and sizes.")
def command(
    *,
    bundle: Path,
    backend: "Flavour",
    output: Path,
    key: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Copy an engine of the bundle BUNDLE into the folder DIR, which runs by itself.

    DIR gets the engine, its manifest, the tokenizer, the generation settings and the licence files of
    the model: neither the weights file nor the ONNX graphs. `generate` and `chat` take it as they
    take a bundle.
    """
    from gemma_deploy import api

    announce_new_folders(output)
    with progress() as on_progress:
        engine = api.pack(bundle, output, backend, engine=key, force=force, on_progress=on_progress)
    files = {name: record.size_bytes for name, record in engine.manifest.files.items()}
    size_bytes = sum(files.values())
    if as_json:
        emit_json({"path": str(engine.folder), "size_bytes": size_bytes, "files": files})
        return
    targets = ", ".join(engine.manifest.build.targets)
    say(f"{engine.folder}  {format_bytes(size_bytes)}, for compute capability {targets}")
    path = shlex.quote(str(engine.folder))
    say(f'Next, on the device: gemma-deploy generate {path} "Once upon a time"')

"""Who takes part beside gemma-deploy, and with which settings: `RIVALS`.

The settings are the fastest found for each, on two AVX2 cores at the shape g270m: llama.cpp without flash
attention (67 tokens/s against 57 after 4,096 tokens, the same after 256), onnxruntime-genai with the
logits of a prompt's last token alone (0.35 s against 0.95 s for 256 tokens), transformers with a static
cache (23 tokens/s against 20). transformers in bfloat16 decodes faster and in float32 prefills faster on
such a CPU, so both take part, as do onnxruntime-genai's defaults.
"""

import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from gemma_deploy.errors import BackendUnavailableError

ModelKind = Literal["gguf", "genai", "genai-default", "checkpoint"]

SETUP: Final = """\
  python3 -m venv rivals-venv
  rivals-venv/bin/pip install torch transformers safetensors gguf onnx_ir onnxruntime \\
      onnxruntime-genai llama-cpp-python==0.3.36
(llama-cpp-python compiles llama.cpp, which takes some 8 minutes on 2 cores), then pass
--rivals-python rivals-venv/bin/python, or choose among those installed with --rival."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """A program to run in turn with ours.

    Attributes:
        program: Module in `benchmarks.rival_programs`.
        model: What it runs.
        modules: What it needs to import, the conversion of its model included.
        description: How it runs.
        settings: What its program is told, `name=value`.
    """

    program: str
    model: ModelKind
    modules: tuple[str, ...]
    description: str
    settings: tuple[str, ...] = ()


_LLAMA_CPP: Final = ("llama_cpp", "gguf")
_GENAI: Final = ("onnxruntime_genai", "onnx_ir", "torch", "transformers")
_TRANSFORMERS: Final = ("torch", "transformers")
_Q4_0: Final = "Q4_0 in all matrices"
_HALF_CACHE: Final = "float16 KV cache, no flash attention"

RIVALS: Final = {
    "llama.cpp": Rival(
        program="llama_cpp_program",
        model="gguf",
        modules=_LLAMA_CPP,
        description=f"{_Q4_0}, {_HALF_CACHE}, weights read into memory",
        settings=("mmap=off", "flash_attention=off", "cache=F16"),
    ),
    "llama.cpp-mmap": Rival(
        program="llama_cpp_program",
        model="gguf",
        modules=_LLAMA_CPP,
        description=f"{_Q4_0}, {_HALF_CACHE}, weights mapped (its default)",
        settings=("mmap=on", "flash_attention=off", "cache=F16"),
    ),
    "llama.cpp-8-bit-cache": Rival(
        program="llama_cpp_program",
        model="gguf",
        modules=_LLAMA_CPP,
        description=f"{_Q4_0}, Q8_0 KV cache, flash attention, weights read into memory",
        settings=("mmap=off", "flash_attention=on", "cache=Q8_0"),
    ),
    "onnxruntime-genai": Rival(
        program="genai_program",
        model="genai",
        modules=_GENAI,
        description="int4 in blocks of 128, logits of a prompt's last token alone (prune_lm_head)",
    ),
    "onnxruntime-genai-default": Rival(
        program="genai_program",
        model="genai-default",
        modules=_GENAI,
        description="int4 as its builder makes it by default: blocks of 32, logits of the whole prompt",
    ),
    "transformers": Rival(
        program="transformers_program",
        model="checkpoint",
        modules=_TRANSFORMERS,
        description="bfloat16, eager, fused attention, static cache",
        settings=("dtype=bfloat16",),
    ),
    "transformers-float32": Rival(
        program="transformers_program",
        model="checkpoint",
        modules=_TRANSFORMERS,
        description="float32, eager, fused attention, static cache",
        settings=("dtype=float32",),
    ),
}


def check_installed(python: Path, names: Collection[str]) -> None:
    """Check that the rivals' Python can run these rivals.

    Raises:
        BackendUnavailableError: It is no Python, or modules are missing in it.
    """
    needed = sorted({module for name in names for module in RIVALS[name].modules})
    code = (
        "import importlib.util as u, sys; "
        "print(*(m for m in sys.argv[1:] if u.find_spec(m) is None))"
    )
    try:
        done = subprocess.run(  # noqa: S603 - the interpreter that the user named
            [str(python), "-c", code, *needed], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as err:
        raise BackendUnavailableError(
            f"--rivals-python {python} is not a Python that runs ({err}). Set one up:\n{SETUP}"
        ) from err
    missing = set(done.stdout.split())
    if missing:
        lacking = [name for name in names if missing & set(RIVALS[name].modules)]
        raise BackendUnavailableError(
            f"{python} lacks {', '.join(sorted(missing))}, which {', '.join(lacking)} needs. "
            f"Set it up:\n{SETUP}"
        )

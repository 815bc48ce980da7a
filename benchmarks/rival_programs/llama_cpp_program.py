"""Time llama.cpp, through the functions of its C library, as llama-cpp-python binds them.

Not through the class `Llama`: it would fill batches token by token in Python, and compute a long
prompt's logits once for every 512 tokens.
"""

import ctypes
from typing import Any

import numpy as np

from benchmarks.rival_programs.timing import Job, run

_UBATCH_TOKENS = 512
_CONTEXT_STEP = 256


class LlamaCpp:
    """A GGUF file and a context that holds the prompt and what follows."""

    def __init__(self, job: Job) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        self._be_quiet = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(self._be_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        is_mapped = job.settings["mmap"] == "on"
        _set(
            params,
            load_mode=llama_cpp.LLAMA_LOAD_MODE_MMAP
            if is_mapped
            else llama_cpp.LLAMA_LOAD_MODE_NONE,
        )
        model = llama_cpp.llama_model_load_from_file(str(job.model).encode(), params)
        if model is None:
            raise SystemExit(f"llama.cpp cannot load {job.model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._context = self._new_context(model, job)
        self._prompt = (llama_cpp.llama_token * len(job.prompt))(*job.prompt)
        self._last = (llama_cpp.llama_token * 1)()

    def _new_context(self, model: Any, job: Job) -> Any:
        length = len(job.prompt) + job.new_tokens
        params = self._library.llama_context_default_params()
        is_flash = job.settings["flash_attention"] == "on"
        cache_type = getattr(self._library, f"GGML_TYPE_{job.settings['cache']}")
        _set(
            params,
            n_ctx=-(-length // _CONTEXT_STEP) * _CONTEXT_STEP,
            n_batch=len(job.prompt),
            n_ubatch=min(len(job.prompt), _UBATCH_TOKENS),
            n_threads=job.threads,
            n_threads_batch=job.threads,
            type_k=cache_type,
            type_v=cache_type,
            flash_attn_type=self._library.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if is_flash
            else self._library.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        )
        context = self._library.llama_init_from_model(model, params)
        if context is None:
            raise SystemExit(f"llama.cpp cannot make a context of {length} tokens")
        return context

    def begin(self) -> None:
        """Empty the KV cache."""
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_clear(memory, False)

    def prefill(self) -> None:
        """Run the prompt; only its last token has logits."""
        self._run(self._prompt)

    def step(self) -> None:
        """Run the last token."""
        self._run(self._last)

    def _run(self, tokens: Any) -> None:
        batch = self._library.llama_batch_get_one(tokens, len(tokens))
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise SystemExit(f"llama_decode of {len(tokens)} tokens returned {status}")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        # numpy's argmax: llama.cpp's own greedy sampler first writes 12 bytes for every token there is.
        self._last[0] = int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def _set(params: Any, **values: object) -> None:
    """Set fields of a C structure, which would take any other name as well, without effect.

    Raises:
        SystemExit: There is no such field.
    """
    for name, value in values.items():
        if not hasattr(params, name):
            raise SystemExit(
                f"llama.cpp's {type(params).__name__} has no {name}: this program knows "
                "llama-cpp-python 0.3.36 (pip install llama-cpp-python==0.3.36)"
            )
        setattr(params, name, value)


if __name__ == "__main__":
    run(LlamaCpp, ("llama-cpp-python",))

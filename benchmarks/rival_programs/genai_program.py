"""Time onnxruntime-genai on a CPU, on a folder that its own builder wrote."""

import json
from typing import Any

import numpy as np

from benchmarks.rival_programs.timing import Job, run


class OnnxRuntimeGenai:
    """A model folder; each round has a generator, and so a KV cache, of its own."""

    def __init__(self, job: Job) -> None:
        import onnxruntime_genai

        self._library: Any = onnxruntime_genai
        config = onnxruntime_genai.Config(str(job.model))
        options = {"intra_op_num_threads": job.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)
        self._prompt = np.asarray(job.prompt, np.int32)
        self._length = len(job.prompt) + job.new_tokens
        self._generator: Any = None

    def begin(self) -> None:
        """Make a generator that goes on to the full length, past ends of text."""
        self._generator = None  # the last one's cache is freed before the next one's is there
        params = self._library.GeneratorParams(self._model)
        params.set_search_options(max_length=self._length, min_length=self._length, do_sample=False)
        self._generator = self._library.Generator(self._model, params)

    def prefill(self) -> None:
        """Run the prompt and pick a token."""
        self._generator.append_tokens(self._prompt)
        self._generator.generate_next_token()

    def step(self) -> None:
        """Run the last token and pick the next."""
        self._generator.generate_next_token()


if __name__ == "__main__":
    run(OnnxRuntimeGenai, ("onnxruntime-genai", "onnxruntime"))

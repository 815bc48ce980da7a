"""Time transformers' own Gemma on a CPU: eager torch, its fused attention, a static KV cache."""

from typing import Any

from benchmarks.rival_programs.timing import Job, run


class Transformers:
    """A checkpoint folder; each round has a KV cache of its own."""

    def __init__(self, job: Job) -> None:
        import torch
        import transformers

        torch.set_num_threads(job.threads)
        self._torch = torch
        self._new_cache = transformers.StaticCache
        dtype = getattr(torch, job.settings["dtype"])
        gemma: Any = transformers.GemmaForCausalLM
        self._model = gemma.from_pretrained(job.model, dtype=dtype).eval()
        self._prompt = torch.tensor([job.prompt])  # [1, S]
        self._length = len(job.prompt) + job.new_tokens
        self._cache: Any = None
        self._last = self._prompt

    def begin(self) -> None:
        """Make an empty cache."""
        self._cache = None  # freed before the next one is there
        self._cache = self._new_cache(config=self._model.config, max_cache_len=self._length)

    def prefill(self) -> None:
        """Run the prompt; only its last token has logits."""
        self._run(self._prompt)

    def step(self) -> None:
        """Run the last token."""
        self._run(self._last)

    def _run(self, token_ids: Any) -> None:
        with self._torch.inference_mode():
            output = self._model(
                token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
            )
            self._last = output.logits[:, -1:].argmax(-1)  # [1, 1]


if __name__ == "__main__":
    run(Transformers, ("transformers", "torch"))

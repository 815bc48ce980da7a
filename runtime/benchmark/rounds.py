"""One contender's rounds of one case, timed step by step: `CaseRunner`."""

import time
from typing import Final

import numpy as np

from gemma_deploy.errors import SessionError
from gemma_deploy.runtime.batch_runner import BatchRunner
from gemma_deploy.runtime.benchmark.plan import cached_tokens
from gemma_deploy.runtime.benchmark.results import BenchCase, RoundTimes
from gemma_deploy.runtime.generator import never
from gemma_deploy.runtime.request import GenerationOptions
from gemma_deploy.runtime.sessions.session import Session

# Control tokens are among the first.
_FIRST_TOKEN: Final = 8


class CaseRunner:
    """Runs a case over and over in one KV cache, as a server that keeps its cache would.

    The loop is the one that generates text: greedy, ends of text ignored. Prompts are random tokens,
    the same for every contender: only their number matters to the time.
    """

    def __init__(
        self,
        session: Session,
        case: BenchCase,
        *,
        prefill_chunk: int,
        max_seq_len: int | None = None,
    ) -> None:
        """Prepare; nothing is allocated or run yet.

        Args:
            session: What runs the steps.
            case: What to run.
            prefill_chunk: Most tokens of a prompt in one step.
            max_seq_len: Length of the cache, in tokens; None for what text generation allocates.
        """
        random = np.random.default_rng(case.prompt_tokens)
        first = min(_FIRST_TOKEN, session.config.vocab_size - 1)
        shape = (case.batch_size, case.prompt_tokens)
        self._prompts = random.integers(first, session.config.vocab_size, shape).tolist()
        self._options = GenerationOptions(max_new_tokens=case.new_tokens, ignore_eos=True, seed=0)
        limits = session.limits
        self._limit = limits.max_seq_len or session.config.max_position_embeddings
        self._case = case
        self._runner = BatchRunner(
            session, max_seq_len=max_seq_len, limit=self._limit, prefill_chunk=prefill_chunk
        )
        self._capacity = self._runner.capacity(self._prompts, self._options)

    def run(self) -> RoundTimes:
        """Run the case once.

        Raises:
            SessionError: The backend failed, or it ended before all tokens were there.
        """
        batch = self._runner.start(self._prompts, self._options, self._capacity, stop_token_ids=())
        times_s = []
        started_s = time.perf_counter()
        for _ in self._runner.steps(batch, never):
            now_s = time.perf_counter()
            times_s.append(now_s - started_s)
            started_s = now_s
        if len(times_s) != self._case.new_tokens:
            raise SessionError(
                f"{self._case}: generation ended after {len(times_s)} tokens; the KV cache holds "
                f"{self._limit:,} tokens, and {cached_tokens(self._case):,} were to be cached"
            )
        return RoundTimes(ttft_s=times_s[0], step_s=tuple(times_s[1:]))

    def free(self) -> None:
        """Let go of the cache."""
        self._runner.free()

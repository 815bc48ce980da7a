"""How an engine of tests was built; no engine runs with it."""

from typing import Final

from gemma_deploy.engine_build import EngineBuild, EngineLimits

LIMITS: Final = EngineLimits(
    max_batch_size=2, max_seq_len=100, max_step_tokens=30, max_logits=3, num_candidates=7
)
BUILD: Final = EngineBuild(
    flavour="tensorrt-rtx",
    library_version="1.7.1",
    targets=("8.0", "8.9"),
    layout="one-engine",
    attention="auto",
    plugin_version="1",
    limits=LIMITS,
    graphs={"prefill": "a", "decode": "b"},
    weights="c",
)

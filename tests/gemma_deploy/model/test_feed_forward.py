import torch
from transformers import GemmaConfig as TheirConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP

from gemma_deploy.config import GemmaConfig
from gemma_deploy.model.feed_forward import GemmaFeedForward


def test_equals_transformers() -> None:
    ours = GemmaFeedForward(GemmaConfig(hidden_size=12, intermediate_size=20))
    theirs = GemmaMLP(TheirConfig(hidden_size=12, intermediate_size=20))  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(0)) * 5
    with torch.no_grad():
        assert torch.equal(ours(hidden), theirs(hidden))

import pytest
import torch

from gemma_deploy.exporters.quantization.descent import descend
from gemma_deploy.exporters.quantization.scale_search import search_scales
from gemma_deploy.quantization.codes import round_codes
from gemma_deploy.quantization.formats import WeightFormat


@pytest.mark.parametrize("weight_format", [WeightFormat("int4", 32), WeightFormat("int8", 64)])
def test_no_row_gets_worse_and_all_get_better_together(weight_format: WeightFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(16, 128, generator=generator)
    # Neighbouring inputs that go together: what one weight gets wrong another can make good.
    inputs = torch.randn(1000, 128, generator=generator).cumsum(-1)
    hessian = inputs.T @ inputs / 1000 + 0.1 * torch.eye(128)
    scales = search_scales(target, hessian.diagonal(), weight_format)
    size = weight_format.block_size or 128
    codes = round_codes(target / scales.repeat_interleave(size, -1), weight_format)

    def losses() -> torch.Tensor:
        error = (target - codes * scales.repeat_interleave(size, -1)).double()
        return ((error @ hessian.double()) * error).sum(-1)

    before = losses()
    descend(target, hessian, codes, scales, weight_format)
    after = losses()
    assert bool((after <= before * 1.0001).all())
    assert after.sum() < 0.5 * before.sum()
    assert bool((codes == codes.round()).all())
    assert bool((scales == scales.half().float()).all())
    assert codes.abs().max() <= (8 if weight_format.scheme == "int4" else 127)
    assert weight_format.scheme == "int4" or bool((scales > 0).all())

import pytest

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.devices import Device


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("auto", Device(kind="auto")),
        ("cpu", Device(kind="cpu")),
        ("cuda", Device(kind="cuda")),
        ("cuda:3", Device(kind="cuda", index=3)),
    ],
)
def test_parse(text: str, device: Device) -> None:
    assert Device.parse(text) == device


@pytest.mark.parametrize("text", ["", "gpu", "cpu:0", "auto:1", "cuda:", "cuda:-1", "CUDA"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="expected auto, cpu, cuda or cuda:N"):
        Device.parse(text)

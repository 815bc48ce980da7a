import pytest
import torch

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.devices import Device


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("auto", Device(kind="auto")),
        ("cpu", Device(kind="cpu")),
        ("cuda", Device(kind="cuda")),
        ("cuda:3", Device(kind="cuda", index=3)),
        (0, Device(kind="cuda")),
        (2, Device(kind="cuda", index=2)),
        (-1, Device(kind="cpu")),
        (torch.device("cpu"), Device(kind="cpu")),
        (torch.device("cuda", 1), Device(kind="cuda", index=1)),
    ],
)
def test_parse(text: object, device: Device) -> None:
    assert Device.parse(text) == device


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gpu",
        "cpu:0",
        "auto:1",
        "cuda:",
        "cuda:-1",
        "CUDA",
        -2,
        0.0,
        True,
        None,
        torch.device("mps"),
    ],
)
def test_parse_refuses(text: object) -> None:
    with pytest.raises(RequestError, match="expected auto, cpu, cuda or cuda:N"):
        Device.parse(text)


def test_text_of_a_device() -> None:
    assert [str(Device.parse(text)) for text in ("auto", "cpu", "cuda", "cuda:1")] == [
        *("auto", "cpu", "cuda:0", "cuda:1")
    ]

import ctypes

import pytest

from gemma_deploy.cuda_driver import cuda_device_count


def test_no_driver_means_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert cuda_device_count() == 0


class _Driver:
    """NVIDIA's driver library, as far as it is asked."""

    def __init__(self, init_result: int, count: int) -> None:
        self.init_result = init_result
        self.count = count

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's name
        assert flags == 0
        return self.init_result

    def cuDeviceGetCount(self, pointer: object) -> int:  # noqa: N802 - the driver's name
        ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = self.count  # type: ignore[arg-type]  # what byref gives has no public type
        return 0


@pytest.mark.parametrize(("init_result", "count"), [(0, 2), (100, 0)])
def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, init_result: int, count: int) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: _Driver(init_result, 2))
    assert cuda_device_count() == count

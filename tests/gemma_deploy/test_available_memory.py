from gemma_deploy.available_memory import available_memory_bytes


def test_this_machine_has_some_memory_available() -> None:
    available = available_memory_bytes()
    assert available is not None
    assert 1 << 26 < available < 1 << 50

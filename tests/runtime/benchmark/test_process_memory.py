import numpy as np

from gemma_deploy.runtime.benchmark.gpu_memory import sum_of_process
from gemma_deploy.runtime.benchmark.process_memory import read_memory


def test_memory_that_was_taken_is_seen() -> None:
    before = read_memory()
    block = np.ones(1 << 27, np.uint8)
    during = read_memory()
    del block
    after = read_memory()
    assert before.anonymous_bytes is not None
    assert during.anonymous_bytes is not None
    assert after.peak_bytes is not None
    assert during.anonymous_bytes - before.anonymous_bytes > 1 << 26
    assert after.peak_bytes >= during.anonymous_bytes


def test_a_process_s_memory_on_all_gpus() -> None:
    lines = ["4242, 1130", "17, 5", "4242, 70", "4242, [N/A]", ""]
    assert sum_of_process(lines, 4242) == 1200 << 20
    assert sum_of_process(lines, 99) is None

import os

import pytest

from gemma_deploy.errors import GemmaDeployWarning, RequestError
from gemma_deploy.machine import usable_cores
from gemma_deploy.runtime import threads
from gemma_deploy.runtime.threads import check_threads, usable_threads


def test_threads_are_bounded_by_the_cores_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 3)
    for count in (None, 1, 12):
        check_threads(count)
    with pytest.raises(
        RequestError, match=r"threads is 13; this process may use 3 core\(s\), .* 12"
    ):
        check_threads(13)
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(RequestError, match="threads is "):
            check_threads(wrong)  # type: ignore[arg-type]  # on purpose


def test_more_threads_than_cores_become_as_many_with_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: 3)
    for count in (None, 1, 3):
        assert usable_threads(count) == count
    with pytest.warns(GemmaDeployWarning, match=r"threads is 4; .* 3 core\(s\), so 3 are used"):
        assert usable_threads(4) == 3
    with pytest.raises(RequestError, match="threads is 13"):
        usable_threads(13)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_cores_that_the_process_may_not_use_do_not_count() -> None:
    before = os.sched_getaffinity(0)
    assert usable_cores() == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)

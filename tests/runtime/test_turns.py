import threading
import time
from collections.abc import Generator

import pytest

from gemma_deploy.errors import RequestError
from gemma_deploy.runtime.turns import SharedIterator, Turns

DEADLINE_S = 30.0


def test_one_thread_at_a_time() -> None:
    turns = Turns()
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(50):
            with turns.taken():
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(most) == 200
    assert set(most) == {1}


def test_who_waits_comes_before_who_has_just_been() -> None:
    turns = Turns()
    order: list[str] = []
    is_waiting = threading.Event()

    def wait() -> None:
        is_waiting.set()
        with turns.taken():
            order.append("waited")

    for _ in range(30):  # a plain lock gets some of them right
        is_waiting.clear()
        with turns.taken():
            thread = threading.Thread(target=wait)
            thread.start()
            assert is_waiting.wait(DEADLINE_S)
            time.sleep(0.01)
        with turns.taken():
            order.append("again")
        thread.join(DEADLINE_S)
    assert order == ["waited", "again"] * 30


def test_the_owner_may_take_it_again() -> None:
    turns = Turns()
    with turns.taken(), turns.taken():
        pass
    with pytest.raises(ZeroDivisionError), turns.taken():
        _ = 1 / 0
    done = threading.Thread(target=lambda: turns.taken().__enter__())
    done.start()
    done.join(DEADLINE_S)
    assert not done.is_alive()  # it was given back


def numbers(count: int) -> Generator[int]:
    for number in range(count):
        time.sleep(0)
        yield number


def test_each_item_goes_to_one_thread() -> None:
    shared = SharedIterator(numbers(400), "it")
    found: list[list[int]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=some.extend, args=(shared,)) for some in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(number for some in found for number in some) == list(range(400))


def test_it_is_not_for_what_it_calls_itself() -> None:
    def asking() -> Generator[int]:
        yield next(shared)

    shared = SharedIterator(asking(), "it")
    with pytest.raises(RequestError, match="it was asked for more by something that it calls"):
        next(shared)
    assert list(shared) == []


def test_closed_it_has_no_more() -> None:
    shared = SharedIterator(numbers(9), "it")
    assert next(shared) == 0
    shared.close()
    assert list(shared) == []


def test_a_callback_does_not_wait_for_another_thread() -> None:
    is_asked, may_go = threading.Event(), threading.Event()

    def waiting() -> Generator[int]:
        is_asked.set()
        assert may_go.wait(DEADLINE_S)
        yield 0

    shared = SharedIterator(waiting(), "it", lambda: threading.current_thread() is main)
    main = threading.current_thread()
    other = threading.Thread(target=next, args=(shared,))
    other.start()
    assert is_asked.wait(DEADLINE_S)
    with pytest.raises(RequestError, match="or another call that runs"):
        next(shared)
    shared.close()  # which the other thread's item is not taken from
    may_go.set()
    other.join(DEADLINE_S)


def test_an_interrupt_leaves_no_lock_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()

    class Interrupted:
        """A lock that is interrupted as soon as it is taken."""

        def __init__(self) -> None:
            self.lock = turns._lock

        def acquire(self) -> None:
            self.lock.acquire()
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> object:
            return getattr(self.lock, name)

    monkeypatch.setattr(turns, "_lock", Interrupted())
    with pytest.raises(KeyboardInterrupt), turns.taken():
        pass
    monkeypatch.undo()
    thread = threading.Thread(target=lambda: turns.taken().__enter__())
    thread.start()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()

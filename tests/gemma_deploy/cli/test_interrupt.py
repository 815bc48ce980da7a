import signal

import pytest

from gemma_deploy.cli.interrupt import cancel_on_interrupt


class TestCancelOnInterrupt:
    def test_the_first_is_a_wish(self) -> None:
        with cancel_on_interrupt() as is_cancelled:
            assert not is_cancelled()
            signal.raise_signal(signal.SIGINT)
            assert is_cancelled()

    def test_the_second_is_an_exception(self) -> None:
        with cancel_on_interrupt():
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    def test_afterwards_all_is_as_before(self) -> None:
        before = signal.getsignal(signal.SIGINT)

        with cancel_on_interrupt():
            assert signal.getsignal(signal.SIGINT) is not before

        assert signal.getsignal(signal.SIGINT) is before

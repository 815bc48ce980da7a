"""How many threads CPU kernels may have."""

from typing import Final

from gemma_deploy.errors import RequestError, warn
from gemma_deploy.machine import usable_cores
from gemma_deploy.runtime.request import whole_number

# More only get into each other's way: a thousand on two cores never come to an end.
_MOST_THREADS_PER_CORE: Final = 4


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads below 1 or far beyond the cores that this process may use.

    Raises:
        RequestError: Stating the cores found.
    """
    if threads is None:
        return
    threads = whole_number("threads", threads, 1)
    cores = usable_cores()
    if threads > _MOST_THREADS_PER_CORE * cores:
        raise RequestError(
            f"threads is {threads:,}; this process may use {cores} core(s), where more than "
            f"{_MOST_THREADS_PER_CORE * cores} threads would hardly advance: use {cores}, or leave it out"
        )


def usable_threads(threads: int | None) -> int | None:
    """Return a number of threads, or as many as this process may use cores where it is more.

    Raises:
        RequestError: As `check_threads`.

    Warns:
        GemmaDeployWarning: It is more.
    """
    check_threads(threads)
    cores = usable_cores()
    if threads is None or threads <= cores:
        return threads
    warn(f"threads is {threads}; this process may use {cores} core(s), so {cores} are used")
    return cores

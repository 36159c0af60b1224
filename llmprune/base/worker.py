"""One thread for what may be done beside the main one: jobs in order, a fault told to who asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Worker:
    """Carries out jobs in the order they are given; after one that failed none is begun.

    >>> done = []
    >>> worker = Worker("writer")
    >>> worker.begin(lambda: done.append(1))
    >>> worker.settle()
    >>> done
    [1]
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._pending: deque[Future[None]] = deque()
        self._fault: BaseException | None = None

    def begin(self, job: Callable[[], object]) -> None:
        """Give the thread a job.

        Raises:
            BaseException: what an earlier job failed with.
        """
        if self._fault is not None:
            raise self._fault
        self._pending.append(self._pool.submit(self._do, job))

    def settle(self) -> None:
        """Wait for all jobs.

        Raises:
            BaseException: what one failed with, each time.
        """
        while self._pending:
            self._pending.popleft().result()
        if self._fault is not None:
            raise self._fault

    def _do(self, job: Callable[[], object]) -> None:
        if self._fault is not None:
            return
        try:
            job()
        except BaseException as error:
            self._fault = error

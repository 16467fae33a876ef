"""Work on blocks in several threads, the results in the order of the blocks.

SciPy's sparse products and NumPy's loops let go of the interpreter, so threads share the counts and need no copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from itertools import chain, islice
from threading import Event, Lock, Thread, local
from typing import TypeVar

from joblib import cpu_count
from threadpoolctl import ThreadpoolController

_thread = local()

Item = TypeVar("Item")
Out = TypeVar("Out")


def in_threads(work: Callable[[Item], Out], items: Iterable[Item]) -> Iterator[Out]:
    """Yield what `work` returns for each item, in their order; no more items are held than there are threads.

    Items are taken in the calling thread, so reading the next one goes on while others are worked on.
    """
    if getattr(_thread, "is_ours", False):  # work within work: there are enough threads already
        yield from map(work, items)
        return
    items = iter(items)
    first = list(islice(items, 2))
    if len(first) < 2:  # work within it may have the threads instead
        with one_blas_thread():
            yield from map(work, first)
        return
    n_threads = cpu_count()
    pending: deque[Future[Out]] = deque()
    with one_blas_thread(), ThreadPoolExecutor(n_threads, initializer=_start) as pool:
        try:
            for item in chain(first, items):
                pending.append(pool.submit(work, item))
                if len(pending) == n_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def alone(work: Callable[[], Out]) -> Out:
    """Return what `work` returns, run in this thread only; for tasks of a scheduler that has threads of its own."""
    before, _thread.is_ours = getattr(_thread, "is_ours", False), True
    try:
        return work()
    finally:
        _thread.is_ours = before


class _OneBlasThread:
    """A limit of the process that many may ask for at once: set for the first of them, lifted after the last.

    A thread of its own keeps it meanwhile: threadpoolctl lets only the thread that first set a limit change it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._n_users = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._n_users == 0:
                self._is_set, self._is_over = Event(), Event()
                self._keeper = Thread(target=self._keep, daemon=True)
                self._keeper.start()
                self._is_set.wait()
            self._n_users += 1
        try:
            with _limit():  # of this thread, for libraries whose limits are those of threads
                yield
        finally:
            with self._lock:
                self._n_users -= 1
                if self._n_users == 0:
                    self._is_over.set()
                    self._keeper.join()

    def _keep(self) -> None:
        try:
            with _limit():
                self._is_set.set()
                self._is_over.wait()
        finally:
            self._is_set.set()


def _limit() -> AbstractContextManager[object]:
    return _controller().limit(limits=1, user_api="blas")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def _start() -> None:
    _thread.is_ours = True
    _limit()  # until the thread ends


one_blas_thread = _OneBlasThread()
"""Context in which matrix products start no threads of their own, which would fight with ours.

With one thread their rounding is the same too, whoever else is at work in the process.
"""

"""Work on blocks in several threads, the results in the order of the blocks.

SciPy's sparse products and NumPy's loops let go of the interpreter, so threads share the counts and need no copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock, local
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
    n_threads = cpu_count()
    pending: deque[Future[Out]] = deque()
    with one_blas_thread(), ThreadPoolExecutor(n_threads, initializer=_mark) as pool:
        try:
            for item in items:
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
    before = getattr(_thread, "is_ours", False)
    _mark()
    try:
        return work()
    finally:
        _thread.is_ours = before


class _OneBlasThread:
    """A limit of the process that many may ask for at once: set by the first of them, lifted by the last.

    A limit that each set and restored for itself would be lifted under the others, or stay when all have gone.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._n_users = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Return the context."""
        with self._lock:
            if self._n_users == 0:
                self._limit = _controller().limit(limits=1, user_api="blas")
            self._n_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_users -= 1
                if self._n_users == 0:
                    self._limit.restore_original_limits()


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def _mark() -> None:
    _thread.is_ours = True


one_blas_thread = _OneBlasThread()
"""Context in which matrix products start no threads of their own, which would fight with ours.

With one thread their rounding is the same too, whoever else is at work in the process.
"""

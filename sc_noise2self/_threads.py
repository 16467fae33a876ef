"""Work on blocks in several threads, the results in the order of the blocks.

SciPy's sparse products and NumPy's loops let go of the interpreter, so threads share the counts and need no copies.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import chain, islice
from queue import SimpleQueue
from threading import Lock, Thread, local
from typing import Any, TypeVar
from weakref import WeakSet

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


def read_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items, the next of which is made in a thread while one is worked on."""
    end = object()
    with one_blas_thread(), ThreadPoolExecutor(1, initializer=_start) as pool:
        waiting: Future[Any] = pool.submit(next, items, end)
        while (item := waiting.result()) is not end:
            waiting = pool.submit(next, items, end)
            yield item


def alone(work: Callable[[], Out]) -> Out:
    """Return what `work` returns, run in this thread only; for tasks of a scheduler that has threads of its own."""
    before, _thread.is_ours = getattr(_thread, "is_ours", False), True
    try:
        return work()
    finally:
        _thread.is_ours = before


class _User:
    """Somebody who wants matrix products to start no threads."""


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run the block while matrix products start no threads of their own, which would fight with ours.

    With one thread their rounding is the same too, whoever else is at work in the process. The limit is the process's:
    it is set for the first of its users and lifted after the last, by a thread of its own, since threadpoolctl lets
    only the thread that first set a limit change it, and no interrupt can leave that thread half-way.
    """
    user = _User()
    try:
        _ask(user, True)
        with _limit():  # of this thread, for libraries whose limits are those of threads
            yield
    finally:
        _ask(user, False)


def _ask(user: _User, begins: bool) -> None:
    if sys.is_finalizing():  # nobody answers any more: what is closed only now was left suspended
        return
    done: Future[None] = Future()
    _requests.put((user, begins, done))
    done.result()


def _keep(requests: SimpleQueue[tuple[_User, bool, Future[None]]]) -> None:
    """Set and lift the limit as users begin and end; one that an interrupt kept from ending is forgotten by itself."""
    users: WeakSet[_User] = WeakSet()
    limit: Any = None
    while True:
        user, begins, done = requests.get()
        (users.add if begins else users.discard)(user)
        del user
        try:
            if users and limit is None:
                limit = _limit()
            elif not users and limit is not None:
                limit.restore_original_limits()
                limit = None
        except Exception as error:  # is the caller's: this thread serves others too
            done.set_exception(error)
        else:
            done.set_result(None)


def _start_keeper() -> None:
    """Start the thread that keeps the limit; a process that was forked has none."""
    global _requests  # noqa: PLW0603
    _requests = SimpleQueue()
    Thread(target=_keep, args=(_requests,), daemon=True).start()


def one_openmp_thread() -> Any:
    """Return a context in which loops of OpenMP, such as scikit-learn's, use this thread alone."""
    return _controller().limit(limits=1, user_api="openmp")


def _limit() -> Any:
    return _controller().limit(limits=1, user_api="blas")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def _start() -> None:
    _thread.is_ours = True
    _limit()  # until the thread ends


class ProcessLock:
    """A lock around what is the process's, not a thread's; a forked child finds it open."""

    def __init__(self) -> None:
        self._open()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._open)

    def _open(self) -> None:
        self._lock = Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


FILTERS = ProcessLock()  # of warnings

_requests: SimpleQueue[tuple[_User, bool, Future[None]]]
_start_keeper()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_keeper)

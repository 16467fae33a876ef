"""Tasks several at a time, in threads or in processes, of which one may end and take only its own task along.

A pool of processes breaks as a whole when one of them ends, and does not say whose task it was. So each process is a
pool of its own, fed by a thread.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from numbers import Integral
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

from joblib import cpu_count
from joblib.externals.loky import BrokenProcessPool, ProcessPoolExecutor
from joblib.externals.loky.backend.reduction import dumps

from ._threads import alone

Prefer = Literal["processes", "threads"]
Item = TypeVar("Item")
Out = TypeVar("Out")

_THREADS = (  # what tells libraries, and this package, how many threads of a process are theirs
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "LOKY_MAX_CPU_COUNT",
)


def as_n_jobs(n_jobs: int) -> int:
    """Return how many tasks run at a time, -1 being as many as there are cores."""
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, Integral) or not (n_jobs == -1 or n_jobs > 0):
        raise ValueError(
            f"n_jobs is {n_jobs!r}: pass a whole number, 1 or more, or -1 for as many as cores ({cpu_count()} here)."
        )
    return cpu_count() if n_jobs == -1 else int(n_jobs)


def in_jobs(
    work: Callable[[Item], Out], items: Sequence[Item], n_jobs: int, prefer: Prefer
) -> Generator[tuple[Item, Out | Exception]]:
    """Yield each item with what `work` returned of it, or with what went wrong, as they are done; one job runs here."""
    if n_jobs == 1:
        for item in items:
            yield item, work(item)
        return
    n_jobs = min(n_jobs, len(items))
    processes = [_Process(max(1, cpu_count() // n_jobs)) for _ in range(n_jobs) if prefer == "processes"]
    idle: SimpleQueue[_Process] = SimpleQueue()
    for process in processes:
        idle.put(process)

    def in_process(item: Item) -> Out:
        process = idle.get()
        try:
            return process.run(work, item)
        finally:
            idle.put(process)

    def in_thread(item: Item) -> Out:
        return alone(lambda: work(item))  # starts no more threads: there are enough

    pool = ThreadPoolExecutor(n_jobs)
    try:
        futures = {pool.submit(in_process if processes else in_thread, item): item for item in items}
        for future in as_completed(futures):
            try:
                out: Out | Exception = future.result()
            except Exception as error:
                out = error
            yield futures.pop(future), out
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.stop()
        raise
    pool.shutdown()
    for process in processes:
        process.close()


def _call(sent: bytes) -> Any:
    """Return what the work that was sent returns of its item."""
    work, item = pickle.loads(sent)
    return work(item)


class _Process:
    """A process that starts when it is needed, and anew when a task ended it."""

    def __init__(self, n_threads: int) -> None:
        self._env = {name: os.environ.get(name, str(n_threads)) for name in _THREADS}
        self._executor = ProcessPoolExecutor(max_workers=1, env=self._env)

    def run(self, work: Callable[[Item], Out], item: Item) -> Out:
        """Return what `work` returns of an item there; a ChildProcessError says that the process ended."""
        try:
            sent = bytes(dumps((work, item)))
        except Exception as error:
            raise TypeError(f"it cannot be sent to another process, so pass prefer='threads': {error}") from error
        try:
            return self._executor.submit(_call, sent).result()
        except BrokenProcessPool as error:
            self.close()
            self._executor = ProcessPoolExecutor(max_workers=1, env=self._env)
            raise ChildProcessError("its process ended, as by a segmentation fault or for want of memory") from error

    def close(self) -> None:
        """End the process, which is idle."""
        self._executor.shutdown()

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        # `shutdown(kill_workers=True)` fails in its own thread where a task was just submitted.
        for process in list((getattr(self._executor, "_processes", None) or {}).values()):
            process.terminate()
        self._executor.shutdown(wait=False)

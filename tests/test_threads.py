"""Work in threads: the limit on those of matrix products is set while it is wanted, lifted after, and never stuck."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import sc_noise2self as n2s
from sc_noise2self._threads import FILTERS, in_threads, one_blas_thread, read_ahead
from sc_noise2self.methods._populations import clusters_of


def blas_threads():
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def test_the_limit_lasts_for_the_last_of_its_users():
    before = blas_threads()
    with one_blas_thread():
        with one_blas_thread():
            assert set(blas_threads()) == {1}
        assert set(blas_threads()) == {1}
    assert blas_threads() == before


def test_a_limit_that_cannot_be_set_is_the_callers_error_and_nobody_elses(monkeypatch):
    def fails():
        raise OSError("no such library")

    before = blas_threads()
    with monkeypatch.context() as patch:
        patch.setattr("sc_noise2self._threads._limit", fails)
        with pytest.raises(OSError, match="no such library"), one_blas_thread():
            pass
    with one_blas_thread():
        assert set(blas_threads()) == {1}
    assert blas_threads() == before


def test_results_come_in_order_and_no_item_is_lost():
    for n in (0, 1, 2, 3, 50):
        assert list(in_threads(lambda i: i * i, range(n))) == [i * i for i in range(n)]


def test_what_is_read_ahead_limits_nobody_after():
    before = blas_threads()
    assert list(read_ahead(iter(range(3)))) == [0, 1, 2]
    assert blas_threads() == before


def test_a_process_ends_though_results_were_left_waiting():
    program = "from sc_noise2self._threads import in_threads; waiting = in_threads(abs, range(10)); next(waiting)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("n", [1, 3])
def test_the_environment_says_how_many_threads_there_are(n, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", str(n))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)), raising=False)
    seen = set()

    def work(item):
        seen.add(threading.get_ident())
        time.sleep(0.01)
        return item

    assert list(in_threads(work, range(20))) == list(range(20))
    assert len(seen) == n


def test_the_number_of_threads_changes_no_value(adata, monkeypatch):
    found = []
    for n in ("1", "3"):
        monkeypatch.setenv("LOKY_MAX_CPU_COUNT", n)
        found.append(n2s.denoise(adata, ["pca", "knn"], copy=True).layers["denoised"])
    np.testing.assert_array_equal(*found)


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer is at work")
def test_an_interrupt_at_any_line_leaves_the_limit_to_be_set_and_lifted():
    before, n_hit = blas_threads(), 0
    for k in range(1, 80):
        try:
            sys.settrace(_interrupt_at(k))
            with one_blas_thread():
                pass
        except KeyboardInterrupt:
            n_hit += 1
        finally:
            sys.settrace(None)
        found = []
        other = threading.Thread(target=lambda found=found: found.extend(in_threads(abs, [-1, -2, -3])), daemon=True)
        other.start()
        other.join(20)
        assert found == [1, 2, 3], f"stuck after an interrupt at line {k}"
        with one_blas_thread():
            assert set(blas_threads()) == {1}
        assert blas_threads() == before
    assert n_hit > 10


def _interrupt_at(k):
    """Return a tracer that sends Ctrl-C before the k-th line of the package's threads and of contexts."""
    n_lines = 0

    def on_line(frame, event, argument):
        nonlocal n_lines
        if event == "line":
            n_lines += 1
            if n_lines == k:
                signal.raise_signal(signal.SIGINT)
        return on_line

    def on_call(frame, event, argument):
        return on_line if os.path.basename(frame.f_code.co_filename) in ("_threads.py", "contextlib.py") else None

    return on_call


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_process_that_is_forked_while_a_thread_clusters_can_cluster_too():
    with FILTERS:  # as another thread would hold it, which the child has not
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(20)
                found = clusters_of(np.repeat([[0.0], [1.0]], 20, axis=0), 2)
                os._exit(0 if len(set(found)) == 2 else 1)
            finally:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_has_the_limit_too():
    with one_blas_thread():
        pass
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            with one_blas_thread():
                os._exit(0 if set(blas_threads()) == {1} else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

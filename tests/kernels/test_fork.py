"""Processes forked while other threads are at work can invert, too."""

import os
import subprocess
import sys

import pytest

#: Forks 10 children while another thread does what `work` says; prints how each of them ended.
FORK = """
import itertools, os, signal, sys, threading, time
import numpy as np
from dask_batchinv.kernels import invert_block, lapack
from dask_batchinv.kernels.cpu import dispatch
from dask_batchinv.kernels.emit import compiler, environment

def compile_one():
    spec = dispatch.spec_of(next(sizes) % 80 + 4, "float64", "positive definite", 16)
    dispatch._loaded.pop(spec, None)
    dispatch._load(spec)

def ask_the_processor():
    for function in (compiler.vector_nbytes, environment._access):
        function.cache_clear()
    invert_block(np.eye(3)[None], dtype="float64", device="cpu")

def use_lapack():
    results = (np.empty(shape, dtype) for shape, dtype in (((1, 100, 100), "f8"), (1, "i4"), (1, "f8")))
    lapack.invert(np.eye(100)[None], *results, structure="symmetric")

sizes, work = itertools.count(), globals()[sys.argv[1]]
stop = threading.Event()

def at_work():
    while not stop.is_set():
        work()

def child():
    signal.alarm(30)
    for n, dtype, structure in ((6, "f4", "general"), (3, "c16", "positive definite"), (5, "f8", "symmetric")):
        a = np.eye(n, dtype=dtype)[None] * 2
        inverse, info, rcond = invert_block(a, dtype=dtype, assume_a=structure, device="cpu")
        assert (inverse == a / 4).all() and not info.any() and (rcond == 1).all()

invert_block(np.eye(2)[None], dtype="f8", device="cpu")
thread = threading.Thread(target=at_work)
thread.start()
for number in range(10):
    time.sleep(0.03 + 0.01 * number)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
stop.set()
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("work", ["compile_one", "ask_the_processor", "use_lapack"])
def test_children_forked_while_another_thread_is_at_work_can_invert(tmp_path, work):
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, work]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=290)
    assert done.stdout.split() == ["0"] * 10, done.stderr
    assert done.returncode == 0


LIMITED = """
import os, signal, threading
import numpy as np
from threadpoolctl import threadpool_info
from dask_batchinv.kernels import lapack
from dask_batchinv.kernels.blas_threads import one_blas_thread

def threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

def work():
    with one_blas_thread():
        entered.set()
        leave.wait()

before, entered, leave = threads(), threading.Event(), threading.Event()
thread = threading.Thread(target=work)
thread.start()
entered.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    status = 1
    try:
        results = (np.empty(shape, dtype) for shape, dtype in (((1, 100, 100), "f8"), (1, "i4"), (1, "f8")))
        lapack.invert(np.eye(100)[None], *results, structure="symmetric")
        assert threads() == before, (threads(), before)
        status = 0
    finally:
        os._exit(status)
print(max(before), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), max(threads()))
leave.set()
thread.join()
assert threads() == before
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_child_has_all_its_blas_threads_after_its_first_kernel():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", LIMITED]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["2", "0", "1"], ["1", "0", "1"]), done.stderr  # one, where there is one processor

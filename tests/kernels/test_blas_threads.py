"""The limit on BLAS threads, entered and left by several threads in every order."""

import itertools
import os
import subprocess
import sys

import pytest
from dask.system import CPU_COUNT

#: Each in a process of its own: a limit that is not taken off stays for good.
SCRIPT = """
import sys, threading
from threadpoolctl import threadpool_info, threadpool_limits
import numpy, scipy.linalg
from dask_batchinv.kernels.blas_threads import one_blas_thread

def limits():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

class Held:
    def __init__(self, make):
        self.entered, self.leave = threading.Event(), threading.Event()
        self.make, self.thread = make, threading.Thread(target=self.run)
        self.thread.start()
        assert self.entered.wait(30)

    def run(self):
        with self.make():
            self.entered.set()
            assert self.leave.wait(30)

    def end(self):
        self.leave.set()
        self.thread.join()

before = limits()
makers, order = sys.argv[1], [int(i) for i in sys.argv[2]]
held = [Held(one_blas_thread if maker == "o" else lambda: threadpool_limits(2, "blas")) for maker in makers]
if makers[0] == "o":
    assert set(limits()) == {1}, limits()
for i in order:
    held[i].end()
with one_blas_thread():
    assert set(limits()) == {1}, limits()
print(limits() == before, max(before))
"""


def cases():
    """Yield who enters (o: ours, u: a user's own limit), and in which order they leave."""
    for makers in ("ooo", "oou", "ouo", "uoo"):
        for order in itertools.permutations(range(3)):
            users = makers.find("u")
            stays = users > 0 and order[-1] == users and CPU_COUNT > 1
            reason = "the user's limit takes ours for what was there before, and puts it back"
            marks = [pytest.mark.xfail(strict=True, reason=reason)] if stays else []
            yield pytest.param(makers, "".join(map(str, order)), marks=marks)


@pytest.mark.parametrize(("makers", "order"), list(cases()))
def test_no_order_of_entering_and_leaving_leaves_a_limit_behind(makers, order):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", SCRIPT, makers, order]
    done = subprocess.run(
        command, env=environment | {"OPENBLAS_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "True", done.stdout

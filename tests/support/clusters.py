"""Clusters that the tests use."""

import time


def wait_until_idle(client):
    """Return once no worker runs a task any more: what was begun outlives the interruption of a driver."""
    deadline = time.monotonic() + 60
    while any(client.run(lambda dask_worker: dask_worker.state.executing_count).values()):
        assert time.monotonic() < deadline, "a worker is still busy after a minute"
        time.sleep(0.01)

"""Preloaded by the workers of the local cluster."""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C to the driver: a terminal sends it to the whole process group, but it is for the driver to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

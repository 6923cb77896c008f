"""A job that somebody has interrupted."""

from __future__ import annotations

from dask_batchinv.text import public

INTERRUPTED_CALL = "Interrupted. What is done is recorded: make the same call again for the rest."


@public
class InterruptedJob(KeyboardInterrupt):
    """A job was interrupted: what is done is recorded, and the same call goes on with the rest. Or a verification."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows: where the job was does not matter."""
        return [str(self)]

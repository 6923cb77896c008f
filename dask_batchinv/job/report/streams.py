"""Standard output and standard error, which whoever reads them may close at any time."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Any

#: How a stream says that nobody reads it any more: a closed pipe, a terminal that is gone.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class Lasting:
    """A stream that takes what is written for ever; once it is closed nobody sees that."""

    def __init__(self, stream: Any):
        # Python has None for what it finds closed.
        self._stream: Any = None if stream is None or stream.closed else stream
        self.failure: OSError | None = None
        """Why something was not written, though somebody reads: a full disk."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Tell whether it is a terminal."""
        return self._stream is not None and bool(self._stream.isatty())

    def write(self, text: str) -> None:
        """Write a text, if anybody reads."""
        if self._stream is None:
            return
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._give_up(error)

    def flush(self) -> None:
        """Write what is held back."""
        if self._stream is None:
            return
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: OSError | ValueError) -> None:
        if isinstance(error, OSError) and error.errno not in _GONE:
            self.failure = error
        # Python flushes the stream once more when it ends, and would complain.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._stream = None


def open_closed_descriptors() -> None:
    """Let the descriptors of standard streams that are closed lead nowhere.

    The next file that is opened would get them, and in it would land what a library, or a worker that inherits them,
    prints.
    """
    for standard in (0, 1, 2):
        try:
            os.fstat(standard)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)

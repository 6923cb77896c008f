"""What may be shown to people: texts without credentials."""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"(?i)((?:key|secret|token|sig|signature|password|passwd|pwd|credential|auth|sas)[^=&\s]*=)[^&\s]+"
)
_USER = re.compile(r"(?<=://)[^/\s]+@")


def redact(text: str) -> str:
    """Return `text` without the credentials that URLs may carry.

    Examples
    --------
    >>> redact("s3://me:hunter2@host/b?token=abc&x=1")
    's3://***@host/b?token=***&x=1'
    """
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


def without_user(url: str) -> str:
    """Return a URL without the user that it names, and the password."""
    return _USER.sub("", url)

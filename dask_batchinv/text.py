"""What may be shown to people: texts without credentials, and without what a terminal would obey."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus, unquote, unquote_plus

import fsspec.config

_MASK = "***"
#: Shorter ones would mask much that is no credential.
_SHORTEST = 6
#: A user of this length is a key or a token.
_LONG_USER = 16
_WORDS = "key|secret|token|sig|signature|password|passwd|pwd|credential|auth|sas"
_SECRET = re.compile(rf"(?i)((?:{_WORDS})[^=&\s]*=)[^&\s]+")
_OPTION = re.compile(rf"(?i){_WORDS}|passphrase|connection_string")
#: Of the query of a URL, also what the keys of Azure's functions and web tokens are called.
_PARAMETER = re.compile(rf"{_OPTION.pattern}|jwt|^code$")
_VARIABLE = re.compile(
    r"(?i)secret|token|passw|passphrase|credential|connection_string|(?:^|_)(?:api|access)?key(?:_|$)|_(?:pwd|pass|sas)$"
)
#: A word that texts may well have: masked where it stands alone.
_PLAIN_WORD = re.compile(r"[a-z]{1,11}")

_Type = TypeVar("_Type", bound=type)

#: Every form of every credential that this process was given.
_remembered: set[str] = set()


# --- credentials ----------------------------------------------------------------------------------------------


def redact(text: str) -> str:
    """Return `text` without credentials: those known to this process, and what looks like one in a URL.

    Known are those of URLs that became a `Location`, of fsspec's configuration, and
    of environment variables with names such as ``AWS_SECRET_ACCESS_KEY``.

    Examples
    --------
    >>> redact("s3://me:hunter2@host/b?token=abc&x=1")
    's3://***@host/b?token=***&x=1'
    >>> redact("s3://me:hun/ter2@bucket/b, s3://bucket/a@b.zarr, http://host:8080/a@b")
    's3://***@bucket/b, s3://bucket/a@b.zarr, http://host:8080/a@b'
    """
    if known := _pattern_of(_known_forms()):
        text = known.sub(_MASK, text)
    return _SECRET.sub(rf"\1{_MASK}", _with_users_replaced(text, f"{_MASK}@"))


def remember_url(url: str) -> None:
    """Let `redact` know the credentials in a URL, or a chain of them."""
    _remembered.update(form for secret in _secrets_of_url(url) for form in _forms(secret))


def remember_options(options: Mapping[str, Any]) -> None:
    """Let `redact` know the credentials among the options of a file system, by their names."""
    _remembered.update(form for secret in _secrets_of_options(options) for form in _forms(secret))


def without_user(url: str) -> str:
    """Return a URL without the user that it names, and the password."""
    return _with_users_replaced(url, "")


def _with_users_replaced(text: str, replacement: str) -> str:
    first, *others = text.split("://")
    parts = [first]
    for part in others:
        if user := _user_of((part.split(maxsplit=1) or [""])[0], parts[-1]):
            part = replacement + part[len(user) + 1 :]
        parts.append(part)
    return "://".join(parts)


def _user_of(rest: str, protocol: str) -> str:
    """Return the user and password before the ``@`` of what follows ``://``; empty if there are none."""
    authority = rest.partition("/")[0]
    if "@" in authority:
        return authority.rpartition("@")[0]
    name, colon, after = authority.partition(":")
    # A host may have a port and a path with an @; a bucket has no port, and the secrets of Amazon have slashes.
    is_port = after.isdecimal() and not protocol.endswith(("s3", "s3a"))
    if not colon or is_port or name == "arn" or name.startswith("[") or "@" not in rest:
        return ""
    password, _, tail = rest.partition("@")
    more, at, _ = tail.partition("/")[0].rpartition("@")
    return f"{password}@{more}" if at else password


def _secrets_of_url(url: str) -> Iterator[str]:
    for link in {url, *url.split("::")}:
        protocol, _, rest = link.partition("://")
        user = _user_of(rest, protocol)
        name, colon, password = user.partition(":")
        if colon:
            # A file system may take what is before a slash for the bucket, and complain of that alone.
            yield from {user, password, *user.split("/"), *password.split("/")}
        if len(name) >= _LONG_USER:
            yield name
        for pair in rest[len(user) :].partition("?")[2].split("&"):
            option, _, value = pair.partition("=")
            if _PARAMETER.search(option):
                yield value


def _secrets_of_options(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets_of_options(value)
        elif isinstance(value, (list, tuple)):  # a user and a password, say
            yield from _secrets_of_options({f"{name} {number}": each for number, each in enumerate(value)})
        elif isinstance(value, bytes):
            yield from _secrets_of_options({name: value.decode(errors="replace")})
        elif isinstance(value, str):
            if _OPTION.search(str(name)):
                yield value
            yield from _secrets_of_url(value)


def _secrets_of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        # The path of a file with a key is no key.
        if _VARIABLE.search(name) and not os.path.exists(value):
            yield value
        if "://" in value:  # of a proxy, say
            yield from _secrets_of_url(value)


def _known_forms() -> frozenset[str]:
    current = {*_secrets_of_environment(), *_secrets_of_options(fsspec.config.conf)}
    return frozenset(_remembered.union(*map(_forms, current)))


@lru_cache(maxsize=1024)
def _forms(secret: str) -> frozenset[str]:
    """Return a credential as URLs, JSON and tracebacks may have it; none if it is too short."""
    plain = {secret, unquote(secret), unquote_plus(secret)}
    ways = ((quote, "/"), (quote, ""), (quote_plus, ""))
    encoded = {code(text, safe, errors="surrogateescape") for text in plain for code, safe in ways}
    encoded |= {re.sub("%..", lambda found: found[0].lower(), text) for text in encoded}
    escaped = {json.dumps(text)[1:-1] for text in plain} | {repr(text)[1:-1] for text in plain}
    escaped |= {text.replace("/", r"\/") for text in escaped}
    return frozenset(form for form in plain | encoded | escaped if len(form) >= _SHORTEST)


@lru_cache(maxsize=8)
def _pattern_of(forms: frozenset[str]) -> re.Pattern[str] | None:
    # The longest first: others may be parts of it.
    alternatives = [
        rf"(?<![a-zA-Z]){form}(?![a-zA-Z])" if _PLAIN_WORD.fullmatch(form) else re.escape(form)
        for form in sorted(forms, key=len, reverse=True)
    ]
    return re.compile("|".join(alternatives)) if alternatives else None


# --- what tracebacks say --------------------------------------------------------------------------------------


def public(kind: _Type) -> _Type:
    """Let a class be called, in tracebacks and documentation, by where users find it."""
    kind.__module__ = __name__.partition(".")[0]
    return kind


# --- what a terminal would obey -------------------------------------------------------------------------------


def printable(text: str) -> str:
    r"""Return `text` on one line, with escapes for all that is not to be seen: control characters, bidi marks, halves.

    Examples
    --------
    >>> print(printable("a\x1b[31mb\r\nc"))
    a\x1b[31mb\r\nc
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def clean(text: str) -> str:
    """Return a line that may be shown: without credentials, and with nothing that a terminal would obey."""
    return printable(redact(text))


def clean_lines(text: str) -> str:
    """Return lines that may be shown."""
    return "\n".join(map(printable, redact(text).split("\n")))


def clean_values(value: Any) -> Any:
    """Return what is to become JSON, without credentials."""
    if isinstance(value, Mapping):
        return {name: clean_values(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean_values(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def harmless(error: BaseException) -> BaseException | None:
    """Return an error as the cause of another if the traceback may show it and its own causes; else None."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        text = "\n".join([str(one), *getattr(one, "__notes__", ())])
        if clean_lines(text) != text:
            return None
        chain.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return error


class CleanError(Exception):
    """An error whose message may be shown, whatever names and texts of others went into it."""

    def __init__(self, *args: Any):
        super().__init__(*(clean(arg) if isinstance(arg, str) else arg for arg in args))

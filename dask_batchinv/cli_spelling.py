"""How the command spells options that texts name as they are passed in Python."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping
from typing import Any

import click

#: An option in a text, and what it is set to, if that is said. In backticks: data may well have an = in them.
_NAMED = re.compile(r"`(\w+)=([^`]*)`")


def spelled(text: str, command: click.Command) -> str:
    """Return a text with the options of a command as they are typed; what is no option of it stays as it is.

    Examples
    --------
    >>> command = click.Command("run", params=[click.Option(["--dims"]), click.Option(["--overwrite"], is_flag=True)])
    >>> spelled("pass `overwrite=True`, or `dims=('a b', 'c')`, or `client=`", command)
    "pass --overwrite, or --dims 'a b,c', or `client=`"
    """
    options = {option.name: max(option.opts, key=len) for option in command.params if isinstance(option, click.Option)}

    def as_typed(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in options:
            return found[0]
        return options[name] if value in ("", "True") else f"{options[name]} {_typed(value)}"

    return _NAMED.sub(as_typed, text)


def _typed(value: str) -> str:
    found = ast.literal_eval(value)
    return shlex.quote(",".join(map(str, found)) if isinstance(found, tuple) else str(found))


def spelled_values(value: Any, command: click.Command) -> Any:
    """Return what is to become JSON, its texts as `spelled`."""
    if isinstance(value, Mapping):
        return {name: spelled_values(inner, command) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [spelled_values(inner, command) for inner in value]
    return spelled(value, command) if isinstance(value, str) else value

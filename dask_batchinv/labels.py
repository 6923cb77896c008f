"""Which dimensions are the rows and columns of matrices, and where their labels are in the inverses. Pure.

The rows of an inverse are what the columns of its matrix were: if ``J`` maps parameters to observations, its inverse
maps observations to parameters.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np

from dask_batchinv.text import public

Dims = Sequence[Hashable]
Pair = tuple[Hashable, Hashable]
#: The labels of a dimension: an index of pandas.
Index = Any
#: The labels of dimensions; None, or nothing, where one has none.
Labels = Mapping[Any, Index | None]


class Exchange(Enum):
    """What changes places in an inverse."""

    NOTHING = "nothing"
    """Rows and columns have the same labels, or none."""
    LABELS = "labels"
    """They have the same labels in another order: the labels change places."""
    NAMES = "names"
    """They have different labels: names and labels change places."""


def exchange(row: Index | None, col: Index | None) -> Exchange:
    """Return what changes places in the inverse of matrices whose rows and columns have such labels.

    Examples
    --------
    >>> import pandas as pd
    >>> a, b = pd.Index(["flux", "color"]), pd.Index(["mass", "radius"])
    >>> exchange(a, a), exchange(a, a[::-1]), exchange(a, b)
    (<Exchange.NOTHING: 'nothing'>, <Exchange.LABELS: 'labels'>, <Exchange.NAMES: 'names'>)
    """
    if row is None or col is None:
        return Exchange.NOTHING if row is col else Exchange.NAMES
    if row.equals(col):
        return Exchange.NOTHING
    return Exchange.LABELS if _same_set(row, col) else Exchange.NAMES


def _same_set(a: Index, b: Index) -> bool:
    return len(a) == len(b) and collections.Counter(a) == collections.Counter(b)


def candidates(dims: Dims, sizes: Mapping[Any, int], labels: Labels) -> list[Pair]:
    """Return the pairs of dimensions that could be rows and columns: equally long, with the same labels or none."""
    return [
        (row, col)
        for row, col in itertools.combinations(dims, 2)
        if sizes[row] == sizes[col] and exchange(labels.get(row), labels.get(col)) is not Exchange.NAMES
    ]


def default_dims(dims: Dims, sizes: Mapping[Any, int], labels: Labels) -> Pair:
    """Return the last two dimensions if nothing else could be meant.

    Raises
    ------
    numpy.linalg.LinAlgError
        If there are no two dimensions, or none that are equally long.
    ValueError
        If it takes a choice, which the error lists.
    """
    shape = tuple(sizes[dim] for dim in dims)
    if len(dims) < 2:
        raise np.linalg.LinAlgError(f"expected a stack of matrices (*, n, n), got shape {shape}")
    last, found = (dims[-2], dims[-1]), candidates(dims, sizes, labels)
    # Of two dimensions there is no other choice, whatever their labels.
    if len(dims) == 2 or found == [last]:
        return last
    if not found and sizes[last[0]] != sizes[last[1]]:
        raise np.linalg.LinAlgError(
            f"expected a stack of square matrices (*, n, n), got shape {shape}: no two dimensions are equally long"
        )
    raise AmbiguousDimsError(last, found)


@public
class AmbiguousDimsError(ValueError):
    """The dimensions of rows and columns must be named.

    Attributes
    ----------
    reason : str
        Why.
    choices : list of tuple
        Which could be meant.
    """

    def __init__(self, last: Pair, found: list[Pair]):
        self.reason = (
            f"{last} are the last two dimensions, but others too could be the rows and columns of the matrices"
            if last in found
            else f"the last two dimensions, {last}, do not look like rows and columns: they differ in length or labels"
        )
        self.choices = found or [last]
        super().__init__(f"{self.reason}: pass {' or '.join(f'dims={pair}' for pair in self.choices)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return ValueError, self.args


def parse_dims(dims: Dims) -> Pair:
    """Return `dims` if it is two names, else raise ValueError."""
    if isinstance(dims, str) or len(dims) != 2:
        raise not_different(dims)
    return dims[0], dims[1]


def not_different(dims: Dims) -> ValueError:
    """Return the error for `dims` that are not two different names."""
    return ValueError(f"dims must name two different dimensions, (row, column); got {dims!r}")


def told_apart(dims: Dims, taken: Collection[Hashable] = ()) -> tuple[Hashable, ...]:
    """Return names of dimensions made different: covariances are often stored as ``(*, p, p)``.

    Parameters
    ----------
    dims
        The names.
    taken
        Names that mean something else, which no new name may be.

    Examples
    --------
    >>> told_apart(("t", "p", "p")), told_apart(("p", "p", "p_2"))
    (('t', 'p', 'p_2'), ('p', 'p_2_2', 'p_2'))
    """
    found: list[Hashable] = []
    for name in dims:
        if name in found:
            while name in (*found, *dims, *taken):
                name = f"{name}_2"
        found.append(name)
    return tuple(found)


def named(dims: Dims, names: Dims, stored: Dims) -> Pair | None:
    """Return the two dimensions that a user names, by `names` told apart or as they are `stored`; None if absent."""
    row, col = parse_dims(dims)
    if row == col:
        twice = [name for name, old in zip(names, stored, strict=True) if old == row]
        return (twice[0], twice[1]) if len(twice) > 1 else None
    return (row, col) if {row, col} <= set(names) else None

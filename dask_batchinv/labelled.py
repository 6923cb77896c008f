"""Xarray objects: which of their arrays are stacks, and where names, labels and attributes are in the inverses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from dask_batchinv import labels
from dask_batchinv.array import invert_any, invert_any_ex
from dask_batchinv.attributes import PLACING, of_inverse, packing_of, refuse_packed
from dask_batchinv.kernels import AnyInverseEx
from dask_batchinv.labels import Dims, Exchange, Pair
from dask_batchinv.options import CallOptions
from dask_batchinv.text import clean

# --- one array ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stack:
    """A DataArray with what its matrices are."""

    array: xr.DataArray
    """The array, no name of a dimension twice."""
    core: Pair
    """Names of the rows and the columns."""
    exchange: Exchange
    """What changes places in the inverse."""

    @classmethod
    def of(cls, a: xr.DataArray, dims: Dims | None, taken: Collection[Hashable] = ()) -> _Stack:
        names, indexes = labels.told_apart(a.dims, {*a.coords, *taken}), labels_of(a)
        stored = dict(zip(names, a.dims, strict=True))
        twice = names != a.dims
        indexes |= {new: indexes.get(old) for new, old in stored.items()}
        wanted = None if dims is None else labels.named(dims, names, a.dims)
        if dims is not None and wanted is None:
            raise _absent(a, dims)
        if twice:
            # Xarray can do next to nothing with such an array; its labels, which both dimensions share, stay.
            along = {name: a.coords[name] for name in a.coords if len(set(a.coords[name].dims)) == a.coords[name].ndim}
            a = xr.DataArray(xr.Variable(names, a.variable.data, a.attrs, a.encoding), along, name=a.name)
        row, col = wanted or labels.default_dims(names, a.sizes, indexes)
        if a.sizes[row] != a.sizes[col]:
            raise np.linalg.LinAlgError(
                f"expected a stack of square matrices (*, n, n), but {row!r} has length {a.sizes[row]} and {col!r} "
                f"{a.sizes[col]}"
            )
        one_name = stored[row] == stored[col]
        return cls(a, (row, col), Exchange.NOTHING if one_name else labels.exchange(indexes.get(row), indexes.get(col)))

    def numbers(self) -> Any:
        """Return the stack without labels, core dimensions last."""
        refuse_packed(
            self.array.attrs,
            "the array" if self.array.name is None else str(self.array.name),
            "it was opened without being decoded: open it with mask_and_scale=True (not rioxarray's default), or "
            "use xarray.decode_cf. If its numbers are decoded already, remove the attributes",
        )
        return self.array.variable.transpose(..., *self.core).data

    def named(self, inverse: Any) -> xr.DataArray:
        """Return the array with its inverse in it, every number at its labels, but names not yet exchanged."""
        a, (row, col) = self.array, self.core
        batch = [dim for dim in a.dims if dim not in self.core]
        core = (row, col) if self.exchange is Exchange.NOTHING else (col, row)
        result = a.copy(deep=False, data=xr.Variable((*batch, *core), inverse).transpose(*a.dims).data)
        result.attrs = of_inverse(a.attrs)
        # How the array was stored is not how its inverse should be.
        result.encoding = {name: value for name, value in a.encoding.items() if name in PLACING}
        return result

    def exchanged(self, inverse: Any) -> xr.DataArray:
        """Return the array with its inverse in it."""
        row, col = self.core
        if self.exchange is Exchange.NOTHING:
            return self.named(inverse)
        turned = self.turned(inverse)
        return turned if self.exchange is Exchange.NAMES else turned.rename({row: col, col: row})

    def turned(self, inverse: Any) -> xr.DataArray:
        """Return the array with its inverse in it, the names of rows and columns exchanged, and labels with them."""
        row, col = self.core
        return self.named(inverse).transpose(*({row: col, col: row}.get(dim, dim) for dim in self.array.dims))

    def in_place(self, inverse: Any) -> xr.DataArray:
        """Return the array with its inverse in it, and every coordinate as it was, for arrays that share those."""
        if self.exchange is not Exchange.LABELS:
            return self.exchanged(inverse)
        row, col = self.core
        indexes = labels_of(self.array)
        if not indexes[row].is_unique:
            raise ValueError(f"the labels of {row!r} and {col!r} are not unique, and in different order")
        # The inverse has the labels of the columns along its rows: brought into the order of the rows.
        ours, theirs = (indexes[b].get_indexer(indexes[a]) for a, b in ((row, col), (col, row)))
        if min(ours) < 0 or min(theirs) < 0:  # True is 1, but no label 1
            raise ValueError(f"the labels of {row!r} and {col!r} are equal, but not of one kind: make them so")
        batch = [dim for dim in self.array.dims if dim not in self.core]
        ordered = xr.Variable((*batch, row, col), inverse).isel({row: ours, col: theirs})
        return _Stack(self.array, self.core, Exchange.NOTHING).named(ordered.transpose(*batch, row, col).data)


def labels_of(a: xr.DataArray | xr.Dataset) -> dict[Hashable, labels.Index]:
    """Return the labels of the dimensions that have some."""
    found = {}
    for dim in a.dims:
        # A dimension may be labelled by an index of another name.
        others = [name for name in a.xindexes if a.coords[name].dims == (dim,)]
        if dim in a.coords or len(others) == 1:
            coordinate = a.coords[dim if dim in a.coords else others[0]].variable
            # Not every index is one of pandas; that of pint has units.
            if hasattr(coordinate.data, "to_base_units"):
                coordinate = xr.Variable(coordinate.dims, coordinate.data.to_base_units().magnitude)
            found[dim] = coordinate.to_index()
    return found


def _absent(a: xr.DataArray, dims: Dims) -> ValueError:
    missing = [dim for dim in dims if dim not in a.dims]
    if not missing:
        return labels.not_different(dims)
    return ValueError(f"dims {missing} are not among the dimensions {a.dims}")


def data_array_inv(a: xr.DataArray, dims: Dims | None, options: CallOptions) -> xr.DataArray:
    """Return a DataArray with every matrix replaced by its inverse."""
    stack = _Stack.of(a, dims)
    return stack.exchanged(invert_any(stack.numbers(), options, None))


def data_array_parts(a: xr.DataArray, dims: Dims | None, options: CallOptions) -> AnyInverseEx:
    """Return the inverse of a DataArray, ``info``, ``rcond`` and the like as DataArrays."""
    stack = _Stack.of(a, dims)
    results = invert_any_ex(stack.numbers(), options)
    batch = [dim for dim in stack.array.dims if dim not in stack.core]
    beside = stack.array.coords.to_dataset().drop_dims(stack.core, errors="ignore").coords
    inverse, *others = results._asdict().items()
    parts = (
        xr.DataArray(xr.Variable(batch, part, {} if name == "info" else {"units": "1"}), beside, name=name)
        for name, part in others
    )
    return type(results)(stack.exchanged(inverse[1]), *parts)


def data_array_inv_ex(a: xr.DataArray, dims: Dims | None, options: CallOptions) -> xr.Dataset:
    """Return the parts of `data_array_parts` as one Dataset."""
    parts = data_array_parts(a, dims, options)._asdict()
    if taken := [name for name in parts if name in a.coords or name in a.dims]:
        raise ValueError(f"{', '.join(taken)} are names of coordinates or dimensions already: rename those first")
    return xr.Dataset(parts)


# --- several arrays -------------------------------------------------------------------------------------------


def dataset_inv(
    ds: xr.Dataset,
    dims: Dims | None,
    options: CallOptions,
    variables: Iterable[Hashable] | None = None,
    *,
    labels_stay: bool = False,
) -> xr.Dataset:
    """Return a Dataset with every matrix of its stacks replaced by its inverse.

    With `labels_stay` no coordinate changes, because others share them.
    """
    chosen = _chosen(ds, variables)
    row, col = core = _common_dims(ds, chosen) if dims is None else labels.parse_dims(dims)
    stacks = {}
    for name in chosen:
        if _has(ds[name], core):
            with _naming(f"in variable {name!r}"):
                stacks[name] = _Stack.of(ds[name], core, {*ds.dims, *ds.variables})
        elif variables is not None:
            raise ValueError(f"the variable {name!r} has not both dimensions {core}; it has {ds[name].dims}")
    if not stacks and row == col:
        raise labels.not_different(core)
    if not stacks:
        raise ValueError(
            f"no floating or complex variable has both dimensions {core}; the Dataset has {tuple(ds.dims)}"
        )
    labels_stay |= any(name not in stacks and {row, col} & set(ds[name].dims) for name in ds.data_vars)
    labels_stay |= {stack.exchange for stack in stacks.values()} != {Exchange.LABELS}
    inverted = {}
    for name, stack in stacks.items():
        with _naming(f"in variable {name!r}"):
            inverse = invert_any(stack.numbers(), options, None)
            inverted[name] = (stack.in_place(inverse) if labels_stay else stack.turned(inverse)).variable
    result = ds.assign(inverted)
    return result if labels_stay else result.rename({row: col, col: row})


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Say of errors where they come from."""
    try:
        yield
    except (np.linalg.LinAlgError, TypeError, ValueError) as error:
        error.add_note(where)
        raise


def _has(a: xr.DataArray, core: Pair) -> bool:
    return labels.named(core, labels.told_apart(a.dims, a.coords), a.dims) is not None


def _chosen(ds: xr.Dataset, variables: Iterable[Hashable] | None) -> list[Hashable]:
    """Return the names of the variables that may be stacks."""
    if variables is None:  # integers that stand for other numbers are chosen to be refused
        return [name for name, a in ds.data_vars.items() if a.dtype.kind in "fc" or packing_of(a.attrs)]
    chosen = _as_list(variables)
    if absent := [name for name in chosen if name not in ds.data_vars]:
        raise ValueError(f"there is no variable {', '.join(map(repr, absent))}; the Dataset has {list(ds.data_vars)}")
    return chosen


def _as_list(variables: Iterable[Hashable]) -> list[Hashable]:
    return [variables] if isinstance(variables, str) else list(variables)


def _common_dims(ds: xr.Dataset, chosen: list[Hashable]) -> Pair:
    """Return the only pair of dimensions that can be meant of some variables, or raise ValueError."""
    found: dict[Pair, list[Hashable]] = {}
    for name in chosen:
        for pair in _pairs(ds[name]):
            found.setdefault(pair[::-1] if pair[::-1] in found else pair, []).append(name)
    if not found:
        raise ValueError(
            "no floating or complex variable has two dimensions that could be rows and columns, equally long and with "
            "the same labels or none: name them with dims=(row, column), or variables of other dtypes with variables=; "
            f"there are { ({name: v.dims for name, v in ds.data_vars.items()}) }"
        )
    choices = "; ".join(
        f"dims={pair} (of {', '.join(clean(str(name)) for name in names)})" for pair, names in found.items()
    )
    if len(found) > 1:
        raise ValueError(
            f"several pairs of dimensions could be the rows and columns of matrices: pass one of {choices}"
        )
    pair = next(iter(found))
    if not any(set(ds[name].dims[-2:]) == set(pair) for name in found[pair]):
        raise ValueError(f"the only dimensions that could be rows and columns are not the last two: pass {choices}")
    return pair


def _pairs(a: xr.DataArray) -> list[Pair]:
    if labels.told_apart(a.dims) != a.dims:
        return [(a.dims[-2], a.dims[-1])] if a.dims[-1] == a.dims[-2] else []
    if a.ndim == 2 and a.shape[0] == a.shape[1]:  # there is no other choice, whatever their labels
        return [(a.dims[0], a.dims[1])]
    return labels.candidates(a.dims, a.sizes, labels_of(a))


def tree_inv(
    tree: xr.DataTree, dims: Dims | None, options: CallOptions, variables: Iterable[Hashable] | None = None
) -> xr.DataTree:
    """Return a DataTree with every matrix of its stacks replaced by its inverse; nodes without any stay as they are."""
    nodes, inverted = {}, 0
    wanted = None if variables is None else _as_list(variables)
    for node in tree.subtree:
        whole = node.to_dataset()
        own = whole if node is tree else node.to_dataset(inherit=False)
        here = None if wanted is None else [name for name in wanted if name in own.data_vars]
        if _has_stacks(whole, dims, here):
            with _naming(f"in node {node.path!r}"):
                own = dataset_inv(whole, dims, options, here, labels_stay=True).drop_vars(
                    set(whole.coords) - set(own.coords)
                )
            inverted += 1
        nodes["/" if node is tree else node.relative_to(tree)] = own
    if absent := [name for name in wanted or () if not any(name in own.data_vars for own in nodes.values())]:
        raise ValueError(f"no node of the DataTree has a variable {', '.join(map(repr, absent))}: pass bare names")
    if not inverted:
        raise ValueError("no node of the DataTree has a variable that could be a stack: pass dims= or variables=")
    return xr.DataTree.from_dict(nodes, name=tree.name)


def _has_stacks(ds: xr.Dataset, dims: Dims | None, variables: list[Hashable] | None) -> bool:
    chosen = _chosen(ds, variables)
    if dims is None:
        return any(_pairs(ds[name]) for name in chosen)
    return any(_has(ds[name], labels.parse_dims(dims)) for name in chosen)


# --- what `inverse` and `inverse_ex` do with them -------------------------------------------------------------


def _variable_inv(a: xr.Variable, dims: Dims | None, options: CallOptions) -> xr.Variable:
    return data_array_inv(xr.DataArray(a), dims, options).variable


def _register(kind: type, invert: Callable[..., Any]) -> None:
    @invert_any.register(kind)
    def _(a: Any, options: CallOptions, out: Any) -> Any:
        if out is not None:
            raise TypeError("out= is not for Xarray objects: use .to_zarr on the result")
        return invert(a, None, options)

    @invert_any_ex.register(kind)
    def _(a: Any, options: CallOptions) -> AnyInverseEx:
        if kind is xr.DataArray:
            return data_array_parts(a, None, options)
        raise TypeError(f"inverse_ex takes DataArrays: pick a variable of the {type(a).__name__}")


_register(xr.DataArray, data_array_inv)
_register(xr.Dataset, dataset_inv)
_register(xr.DataTree, tree_inv)
_register(xr.Variable, _variable_inv)

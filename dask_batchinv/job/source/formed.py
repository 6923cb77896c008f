"""A stack whose matrices stand in their array, or in two, in another form than ``(*, n, n)``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.job.form import Form, rows_of
from dask_batchinv.job.options import JobOptions, Missing
from dask_batchinv.job.seen import Seen, look_at_source
from dask_batchinv.job.source.coordinates import Found, find
from dask_batchinv.job.source.metadata import Node, is_name, read_node, stored_names
from dask_batchinv.job.source.parts import Parts, read_in_parts
from dask_batchinv.job.source.selection import find_window
from dask_batchinv.job.source.source import (
    Source,
    digest_of_labels,
    group_attributes_of,
    mask_beside,
    name_dims,
    open_source,
)
from dask_batchinv.job.source.stored_array import Region, StoredArray
from dask_batchinv.job.source.variable import find_stack
from dask_batchinv.job.tiling import PARTS, TRIANGLE, Tiling
from dask_batchinv.labels import exchange, told_apart
from dask_batchinv.location import Location, Place, raised_as
from dask_batchinv.outcome import SourceError
from dask_batchinv.stack import AssumeA, result_dtype

#: What matrices do not have of which one triangle is there.
_OPPOSITE = {"lower": ("upper triangular",), "upper": ("lower triangular",)}
Opened = tuple[zarr.Array[Any], ...]


@dataclass(frozen=True, kw_only=True)
class FormedSource(Source):
    """A stack that is put together when it is read: what is called stored is its matrices, decoded."""

    form: Form
    """How its numbers stand in its arrays."""
    arrays: tuple[StoredArray, ...]
    """Its array; and that of imaginary parts, if there is one."""
    extra_dims: tuple[tuple[int, str], ...]
    """Names of the dimensions of triangles and of parts, if it has these."""
    assume_a: AssumeA
    """Structure of the matrices: what stands in the other triangle."""

    @property
    def locations(self) -> list[Location]:
        """Where its arrays are."""
        return [*super().locations, *(array.location for array in self.arrays)]

    @property
    def form_dims(self) -> dict[int, str]:
        """Names of dimensions that arrays in its form have beside its own."""
        return dict(self.extra_dims)

    @property
    def packings(self) -> Any:
        """By what the numbers of its arrays are decoded."""
        return [array.packing for array in self.arrays]

    def open(self, missing: Missing = "error") -> zarr.Array[Any]:
        """Open the array, the first of two, for reading."""
        return self.arrays[0].open(missing)

    def open_once(self, run: str, missing: Missing) -> Any:
        """Return its arrays, kept open for a run."""
        return tuple(_open_once(run, array, missing) for array in self.arrays)

    def shape_now(self) -> tuple[int, ...]:
        """Return the shape that it has now."""
        shapes = [array.shape_now() for array in self.arrays]
        if shapes[0] != shapes[-1]:
            raise SourceError(f"real and imaginary parts of {self.location.name} are not equally many any more")
        return *(shapes[0][axis] for axis in self.form.batch), self.n, self.n

    def look(self, tiling: Tiling) -> Seen:
        """Return what the store says of what each tile is made from."""
        axes = tuple(
            self.form.batch.index(axis) if axis in self.form.batch else -1 for axis in range(len(self.arrays[0].shape))
        )
        with raised_as(SourceError, f"the source {self.location.name} cannot be looked at"):
            first, *others = (
                look_at_source(array.location, array.chunk_grid, tiling, axes, array.start) for array in self.arrays
            )
        for seen in (*others, *([] if self.mask is None else [self.mask.look(tiling)])):
            first = first.also(seen)
        return first

    def read_stored(
        self, array: Any, region: Sequence[slice], out: Any = None, coming: Any = None, kept: Any = None
    ) -> npt.NDArray[Any]:
        """Read a region, and put its matrices together."""
        if isinstance(coming, Future):
            found: npt.NDArray[Any] = coming.result()
            return found
        there = self.form.region(tuple(region))
        blocks = [own.read_block(opened, there) for own, opened in zip(self.arrays, array, strict=True)]
        return self._assembled(blocks)

    def _assembled(self, blocks: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        found = self.form.assemble(blocks[0], blocks[1] if len(blocks) > 1 else None, self.assume_a)
        return found.astype(self.dtype, copy=False)

    def fetch(self, array: Any, region: Sequence[slice], pool: Executor) -> Any:
        """Begin to read a region ahead."""
        return pool.submit(self.read_stored, array, region)

    def read_in_parts(self, array: Any, region: Region, out: npt.NDArray[Any]) -> Parts:
        """Read a region chunk by chunk."""
        there, found = self.form.region(region), []
        for own, opened in zip(self.arrays, array, strict=True):
            shape = [span.stop - span.start for span in own.there(there)]
            found.append(read_in_parts(own, opened, there, np.zeros(shape, own.dtype), self.form.batch))
        stored = self._assembled([own.decode(part.stored) for own, part in zip(self.arrays, found, strict=True)])
        unreadable = np.logical_or.reduce([part.unreadable for part in found])
        named = zip(self.arrays, found, strict=True)
        bad = [
            replace(chunk, key=f"{own.location.url.rpartition('/')[2]}/{chunk.key}") if len(self.arrays) > 1 else chunk
            for own, part in named
            for chunk in part.bad
        ]
        return Parts(stored, unreadable, bad)

    def count_missing(self, array: Any, region: Sequence[slice]) -> int:
        """Return how many chunks of a region are not in the store."""
        there = self.form.region(tuple(region))
        return sum(own.count_missing(opened, there) for own, opened in zip(self.arrays, array, strict=True))


@lru_cache(maxsize=16)
def _open_once(run: str, array: StoredArray, missing: Missing) -> zarr.Array[Any]:
    return array.open(missing)


def open_any(path: Place, options: JobOptions) -> Source:
    """Read the metadata of a source, however its matrices stand; SourceError if it is none that can be inverted."""
    if options.form.is_usual:
        return open_source(path, options.variable, options.dims, options.mask, options.select)
    return open_formed(path, options)


def open_formed(path: Place, options: JobOptions) -> FormedSource:
    """Read the metadata of a source whose matrices do not stand as ``(*, n, n)``.

    Raises
    ------
    SourceError
        If it is not what the options say.
    """
    root, form = Location.parse(path), options.form
    with raised_as(SourceError, f"the source {root.name} cannot be opened"):
        node, variable = find_stack(root, options.variable, None)
        inner, _, name = (variable or "").rpartition("/")
        group = None if variable is None else root / inner if inner else root
        arrays = [StoredArray.of(node)]
        if form.imag is not None:
            arrays.append(_imaginary(group, node, arrays[0], form.imag))
        _, names = name_dims(node, len(arrays[0].shape), group)
        found = _form(arrays, names, options)
        return _source(root, group, node, (variable, inner, name), arrays, names, found, options)


def _imaginary(group: Location | None, node: Node, real: StoredArray, name: str) -> StoredArray:
    if not all(map(is_name, name.split("/"))):
        raise SourceError(f"{name!r} is not a name inside the group")
    other = None if group is None else read_node(group / name)
    if other is None or not other.is_array:
        raise SourceError(f"there is no array {name!r} of imaginary parts beside {node.location.name}")
    found = StoredArray.of(other)
    if (found.shape, stored_names(other)) != (real.shape, stored_names(node)):
        raise SourceError(
            f"{name} has other dimensions than {node.location.name}, whose imaginary parts it should have"
        )
    return found


def _form(arrays: list[StoredArray], names: tuple[str, ...], options: JobOptions) -> Form:
    """Return how numbers stand in arrays with these dimensions."""
    wanted, shape = options.form, arrays[0].shape
    left, pair = [*range(len(shape))], None
    if wanted.complex_dim is not None:
        if wanted.complex_dim not in names or shape[names.index(wanted.complex_dim)] != 2:
            raise SourceError(f"`complex_dim=` takes a dimension of length 2; there are {_shown(names, shape)}")
        pair = names.index(wanted.complex_dim)
        left.remove(pair)
    is_complex = any(array.decoded_dtype.kind == "c" for array in arrays)
    if is_complex and (pair is not None or wanted.imag is not None):
        raise SourceError("the numbers are complex already: leave `complex_dim=` and `imag=` out")
    count = 1 if wanted.packed else 2
    core = left[-count:] if options.dims is None else [names.index(dim) for dim in options.dims if dim in names]
    if (
        len(core) != count
        or len(set(core)) < count
        or (options.dims and len(options.dims) != count)
        or not set(core) <= set(left)
    ):
        raise SourceError(f"`dims=` takes {count} of {', '.join(names[axis] for axis in left)} here")
    n = shape[core[0]]
    if wanted.packed is not None:
        n = rows_of(shape[core[0]]) or 0
        if not n:
            raise SourceError(f"{names[core[0]]} is {shape[core[0]]} long, and no triangle has so many numbers")
        triangle = wanted.packed.partition(" ")[0]
        if options.assume_a == "diagonal" or options.assume_a in _OPPOSITE.get(triangle, ()):
            raise SourceError(f"the {triangle} triangle is packed, which {options.assume_a} matrices do not have")
        if options.assume_a == "general" and (is_complex or pair is not None or wanted.imag is not None):
            raise SourceError(
                "of complex matrices a triangle does not tell the other one: pass `assume_a='her'` or `assume_a='sym'`"
            )
    elif shape[core[0]] != shape[core[1]]:
        raise SourceError(f"the core dimensions are not equally long: {_shown(names, shape)}")
    return Form(tuple(axis for axis in left if axis not in core), tuple(core), n, wanted.packed, pair)


def _shown(names: tuple[str, ...], shape: tuple[int, ...]) -> str:
    return ", ".join(f"{name} {size}" for name, size in zip(names, shape, strict=True))


def _check_parts(root: Location, inner: str, node: Node, dim: str, name: str) -> None:
    """Raise SourceError if the labels of real and imaginary parts say that these come first."""
    labels = find(root, inner, node, {dim: 2}, name).labels(dim)
    if labels is not None and str(labels[0]).lower().startswith("im"):
        raise SourceError(f"along {dim} imaginary parts come first, {', '.join(map(str, labels))}: turn it round")


def _source(
    root: Location,
    group: Location | None,
    node: Node,
    named: tuple[str | None, str, str],
    arrays: list[StoredArray],
    names: tuple[str, ...],
    form: Form,
    options: JobOptions,
) -> FormedSource:
    variable, inner, name = named
    batch = [names[axis] for axis in form.batch]
    core = ["row", "col"] if form.packed else [names[axis] for axis in form.core]
    dims = tuple(map(str, told_apart([*batch, *core])))
    shape, axes = arrays[0].shape, (len(batch), len(batch) + 1)
    sizes = {dim: shape[names.index(dim)] for dim in dims if dim in names}
    if options.like_source:  # then these are dimensions of the target, too
        of_form = [*(form.core if form.packed else ()), *(() if form.pair is None else (form.pair,))]
        sizes |= {names[axis]: shape[axis] for axis in of_form}
    beside = Found() if group is None else find(root, inner, node, sizes, name)
    row, col = (None if form.packed else beside.labels(dim) for dim in dims[-2:])
    if form.pair is not None:
        _check_parts(root, inner, node, names[form.pair], name)
    window = find_window(options.select, sizes, batch, beside.labels)
    parts = [array.part({names.index(dim): span for dim, span in window.items()}) for array in arrays]
    logical = [parts[0].shape[axis] for axis in form.batch] + [form.n, form.n]
    mask = None
    if options.mask is not None:
        whole = dict(zip(dims, [*(shape[axis] for axis in form.batch), form.n, form.n], strict=True))
        mask = mask_beside(group, options.mask, whole, axes)
        spans = {mask.axes.index(dims.index(dim)): span for dim, span in window.items() if dims.index(dim) in mask.axes}
        mask = mask.part(spans)
    is_complex = form.pair is not None or len(arrays) > 1
    dtype = result_dtype(np.result_type(*(array.decoded_dtype for array in arrays)))
    dtype = np.result_type(dtype, np.complex64) if is_complex else dtype
    known = vars(parts[0]) | {
        "start": (*(parts[0].start[axis] for axis in form.batch), 0, 0),
        "shape": tuple(logical),
        "read_unit": (*(parts[0].read_unit[axis] for axis in form.batch), form.n, form.n),
        "itemsize_held": len(parts) * max(part.itemsize_held for part in parts) * (2 if form.pair is not None else 1),
        "dtype": dtype,
        "decoded_dtype": dtype,
        "packing": {},
        "plain": None,
        "checksummed": all(part.checksummed for part in parts),
    }
    return FormedSource(
        **known, root=root, group=group, variable=variable, dims=dims, core=axes,
        coordinate_names=tuple(beside.coordinates), coordinates=tuple(beside.coordinates.values()),
        exchange=exchange(row, col), labels=digest_of_labels(row, col), window=window, mask=mask,
        attributes=node.attributes, group_attributes={} if group is None else group_attributes_of(group),
        left_out=tuple(sorted(beside.left_out)), notes=beside.notes(), form=form, arrays=tuple(parts),
        extra_dims=(*([(TRIANGLE, names[form.core[0]])] if form.packed else []),
                    *([] if form.pair is None else [(PARTS, names[form.pair])])),
        assume_a=options.assume_a,
    )  # fmt: skip

"""Which matrices of a stack are left out, by an array beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.attributes import packing_of
from dask_batchinv.job.seen import Seen, look_at_source
from dask_batchinv.job.source.metadata import read_node, stored_names
from dask_batchinv.job.source.stored_array import Region, StoredArray
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.location import Location, raised_as
from dask_batchinv.outcome import SourceError


@dataclass(frozen=True, kw_only=True)
class Mask(StoredArray):
    """Numbers for the matrices of a stack, not 0 where one is left out, or 0 there; or missing ones."""

    is_inverted: bool
    """Whether 0 is where a matrix is left out."""
    axes: tuple[int, ...]
    """The axes of the stack that its own are."""

    def read(self, array: zarr.Array[Any], stack: StoredArray, region: Region) -> npt.NDArray[np.bool_]:
        """Return which matrices in a region of a stack are left out: an axis for each of the region.

        Those that the mask does not have are one long.
        """
        values = self.decode(self.read_stored(array, tuple(region[axis] for axis in self.axes)))
        masked = np.isnan(values) | ((values == 0) == self.is_inverted)
        order = sorted(range(masked.ndim), key=lambda own: self.axes[own])
        absent = [axis for axis in range(len(stack.shape)) if axis not in self.axes]
        found: npt.NDArray[np.bool_] = np.expand_dims(masked.transpose(order), absent)
        return found

    def look(self, tiling: Tiling) -> Seen:
        """Return what the store says of what each tile of a stack is masked by."""
        with raised_as(SourceError, f"the mask {self.location.name} cannot be looked at"):
            return look_at_source(
                self.location, self.chunk_grid, tiling, self.axes, self.start,
                meaning=json.dumps([self.packing, self.facts["fill value"]], default=str), may_be_empty=True,
            )  # fmt: skip


def open_mask(group: Location, text: str, sizes: dict[str, int], core: tuple[int, int]) -> Mask:
    """Return the mask that a text names, an array in a group; with a ``~`` before its name the opposite of it.

    Parameters
    ----------
    group
        Where the stack is.
    text
        What the user says.
    sizes
        The dimensions of the stack, and their lengths.
    core
        Axes of its rows and columns.

    Raises
    ------
    SourceError
        If there is none, or it is not one for the matrices of the stack.
    """
    name = text.removeprefix("~")
    if not name or {"..", "."} & set(name.split("/")) or name.startswith("/"):
        raise SourceError(f"the mask {text!r} is not a name inside the group")
    node = read_node(group / name)
    if node is None or not node.is_array:
        raise SourceError(f"there is no array {name!r} for a mask in {group.name}")
    names, dims = stored_names(node) or [], [*sizes]
    batch = [dim for axis, dim in enumerate(dims) if axis not in core]
    if len(names) != len(node.shape) or not set(names) <= set(batch) or len(set(names)) < len(names):
        raise SourceError(
            f"the mask {name} has the dimensions ({', '.join(map(str, names)) or 'without names'}), which are not "
            f"among those of the matrices, {', '.join(batch)}"
        )
    if tuple(sizes[str(dim)] for dim in names) != node.shape:
        raise SourceError(f"the mask {name} has the shape {node.shape}, which is not that of the stack")
    # Not by the fill value of Zarr's format 2, which is 0 where nobody says otherwise.
    packing = {} if node.meta.get("dtype") in ("|b1", "bool") else packing_of(node.attributes)
    return Mask.of(
        node, packing=packing, is_inverted=text.startswith("~"), axes=tuple(dims.index(str(dim)) for dim in names)
    )

"""What the coordinates of a target say of its matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dask_batchinv.location import Location
from dask_batchinv.outcome import Index
from dask_batchinv.text import clean

#: Places along an axis of a map that get a label, at most.
_MOST_TICKS = 6


class Labels:
    """The coordinates of a target; what of them cannot be read is noted, and left out."""

    def __init__(self, location: Location, dims: tuple[str, ...], notes: list[str]):
        import xarray as xr  # not before it is needed

        self._dims, self._notes, self._coordinates = dims, notes, dict[str, Any]()
        try:
            dataset = xr.open_zarr(
                location.store(read_only=True), chunks=None, create_default_indexes=False, zarr_format=3
            )
            some = {str(name): array for name, array in dataset.coords.items() if {*array.dims} <= {*dims}}
            # Those of the dimensions first, in their order.
            names = [*(dim for dim in dims if dim in some), *(name for name in some if name not in dims)]
            self._coordinates = {name: some[name] for name in names if some[name].dims}
        except Exception as error:  # whatever Xarray, Zarr and a file system may raise
            self._notes.append(clean(f"coordinates cannot be read: {type(error).__name__}: {error}"))

    def of(self, index: Index) -> dict[str, Any]:
        """Return what they say of a matrix: numbers and texts that `Dataset.sel` takes."""
        places: Mapping[str, int] = dict(zip(self._dims, index, strict=True))
        return {
            name: _plain(value[()])
            for name, array in list(self._coordinates.items())
            if (value := self._read(name, array, {dim: places[dim] for dim in array.dims})) is not None
        }

    def ticks(self, dim: str) -> tuple[tuple[int, Any], ...]:
        """Return some places along a dimension, and what the coordinate of its name is there."""
        array = self._coordinates.get(dim)
        if array is None or array.dims != (dim,):
            return ()
        size = array.sizes[dim]
        places = np.unique(np.linspace(0, size - 1, min(size, _MOST_TICKS)).round().astype(int))
        values = self._read(dim, array, {dim: places})
        return (
            ()
            if values is None
            else tuple((int(place), _plain(value)) for place, value in zip(places, values, strict=True))
        )

    def _read(self, name: str, array: Any, where: Mapping[Any, Any]) -> Any:
        try:
            return array.isel(where).values
        except Exception as error:  # damaged, or gone
            del self._coordinates[name]
            self._notes.append(clean(f"the coordinate {name} cannot be read: {type(error).__name__}: {error}"))
        return None


def _plain(value: Any) -> Any:
    """Return a number or a text for a value of a coordinate."""
    if isinstance(value, np.datetime64):
        return str(np.datetime_as_string(value, unit="auto"))
    if isinstance(value, (np.bool_, np.integer, np.floating, float, int)) and np.isfinite(value):
        return value.item() if isinstance(value, np.generic) else value
    return clean(value.decode(errors="replace") if isinstance(value, bytes) else str(value))

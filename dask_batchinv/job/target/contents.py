"""What a target consists of beside its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_batchinv.attributes import of_inverse
from dask_batchinv.job.outputs import LEDGER, Output, Outputs
from dask_batchinv.job.target.encoding import Encoding
from dask_batchinv.job.tiling import Tiling
from dask_batchinv.stack import AssumeA

if TYPE_CHECKING:
    import xarray as xr

#: Attributes by which Xarray keeps what is stored otherwise here.
_OF_XARRAY = frozenset(["_ARRAY_DIMENSIONS", "coordinates"])
#: What arrays are called that have a part of the inverse.
_PARTS = {"diagonal": "diagonal", "imag": "imaginary part"}
#: What the group itself has of documents of Zarr format 2.
OF_FORMAT_2 = (".zgroup", ".zattrs", ".zmetadata")


@dataclass(frozen=True)
class Contents:
    """What a target is created with."""

    tiling: Tiling
    """Shape and tiles of the inverse."""
    dtype: np.dtype[Any]
    """Its dtype."""
    outputs: Outputs
    """The arrays that are made."""
    encoding: Encoding
    """How their chunks are stored."""
    dims: tuple[str, ...]
    """Names of its dimensions."""
    form_dims: dict[int, str]
    """Those of what stands for `TRIANGLE` and `PARTS`."""
    coordinates: xr.Dataset | None
    """Coordinates, undecoded, in memory."""
    attributes: dict[str, Any]
    """Attributes of what is inverted."""
    group_attributes: dict[str, Any]
    """Attributes of the group that it is in."""
    assume_a: AssumeA
    """Structure of the matrices."""

    @property
    def names(self) -> list[str]:
        """Names of the coordinates."""
        return [] if self.coordinates is None else sorted(map(str, self.coordinates.variables))

    def dims_of(self, output: Output) -> list[str]:
        """Return the names of the dimensions of an output."""
        return [self.form_dims.get(axis) or self.dims[axis] for axis in self.tiling.axes(output.extent)]

    @property
    def members(self) -> list[str]:
        """What a target has in it."""
        of_format_2 = OF_FORMAT_2 if self.encoding.zarr_format == 2 else ()
        return [*(output.name for output in self.outputs), LEDGER, *self.names, *of_format_2]

    def attributes_of(self, output: Output) -> dict[str, Any]:
        """Return the attributes of an output."""
        found = output.attributes(self.assume_a)
        placing = {name: value for name, value in self.attributes.items() if name == "grid_mapping"}
        if not output.is_of_inverse:
            return found | placing
        inherited = {name: value for name, value in of_inverse(self.attributes).items() if name not in _OF_XARRAY}
        if output.role in _PARTS and "long_name" in inherited:
            inherited["long_name"] = f"{_PARTS[output.role]} of the {inherited['long_name']}"
        return found | inherited | ({"coordinates": " ".join(self.names)} if self.names else {})

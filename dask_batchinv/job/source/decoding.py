"""Packed numbers, decoded as Xarray decodes them, by its own coders."""

from __future__ import annotations

import struct
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from dask_batchinv.attributes import is_nan, packing_of
from dask_batchinv.job.source.metadata import Node
from dask_batchinv.outcome import SourceError
from dask_batchinv.storage import fill_means_missing
from dask_batchinv.text import harmless

Array = npt.NDArray[Any]
Packing = dict[str, Any]


def attributes_in_xarray(node: Node, array: zarr.Array[Any]) -> dict[str, Any]:
    """Return the attributes of an array as Xarray gives them where numbers are not to be decoded."""
    found = dict(node.attributes)
    if node.zarr_format == 2:
        found = {name: value for name, value in found.items() if not _is_of_netcdf(name)}
        if array.fill_value is not None:
            found["_FillValue"] = array.fill_value
    elif "_FillValue" in found:
        found["_FillValue"] = _decoded_fill_value(found["_FillValue"], array)
    return found


def _is_of_netcdf(name: str) -> bool:
    return name == "_ARRAY_DIMENSIONS" or name.lower().startswith("_nc")


def read_packing(node: Node, array: zarr.Array[Any]) -> Packing:
    """Return the attributes by which Xarray would decode the numbers of an array; none if they mean what they are."""
    found = dict(node.attributes)
    if fill_means_missing(array, node.attributes):
        found["_FillValue"] = array.fill_value
    elif "_FillValue" in found and not _is_plain(found["_FillValue"], array):
        try:
            found["_FillValue"] = _decoded_fill_value(found["_FillValue"], array)
        except (TypeError, ValueError, struct.error) as error:
            raise SourceError(
                f"the attribute _FillValue of {node.location.name} is not one of {array.dtype}: {error}"
            ) from harmless(error)
    return packing_of(found)


def _decoded_fill_value(value: Any, array: zarr.Array[Any]) -> Any:
    from xarray.backends.zarr import FillValueCoder  # Xarray takes longer to import than a small job

    return FillValueCoder.decode(value, array.dtype)


def _is_plain(value: Any, array: zarr.Array[Any]) -> bool:
    """Tell whether a fill value is meant as it stands, and not encoded by Xarray."""
    if array.metadata.zarr_format == 2:  # there Xarray encodes none; several numbers are several that are missing
        values = value if isinstance(value, list) else [value]
        return is_nan(value) or all(isinstance(each, (int, float)) for each in values)
    # A number, where Xarray would write text, is taken for what it is.
    return array.dtype.kind in "fc" and isinstance(value, (int, float))


def decode(block: Array, packing: Packing) -> Array:
    """Return the numbers that a block stands for: missing ones are NaN.

    Examples
    --------
    >>> decode(np.array([25, -1], np.int8), {"scale_factor": 0.5, "_FillValue": -1})
    array([12.5,  nan])
    """
    if not packing:
        return block
    import xarray as xr

    variable = xr.Variable([f"dim_{axis}" for axis in range(block.ndim)], block, dict(packing))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", xr.SerializationWarning)  # "saved with multiple fill values": all are missing
        found = xr.decode_cf(xr.Dataset({"block": variable}), decode_times=False, decode_coords=False)
        decoded: Array = found["block"].values
    return decoded


def decoded_dtype(dtype: np.dtype[Any], packing: Packing) -> np.dtype[Any]:
    """Return the dtype of the numbers that packed ones of `dtype` stand for."""
    try:
        found = decode(np.zeros(1, dtype), packing).dtype
    except Exception as error:  # whatever Xarray makes of attributes that make no sense
        raise SourceError(f"numbers packed by {packing} cannot be decoded: {error}") from harmless(error)
    if found.kind not in ("fc" if dtype.kind in "fc" else "biufc"):
        raise SourceError(
            f"by the attributes {packing} Xarray decodes {dtype} to {found}, which loses digits: write the attributes "
            "as floating numbers"
        )
    return found

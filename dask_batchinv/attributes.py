"""What attributes say of numbers, by the conventions of NetCDF (CF): how they are packed, and what they mean."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from dask_batchinv.text import clean

#: Attributes by which stored numbers stand for others (CF, chapter 8).
SCALES = ("scale_factor", "add_offset", "_Unsigned")
#: Attributes that name the number that stands for a missing one.
FILLS = ("_FillValue", "missing_value")
#: Attributes that name the arrays that place the numbers: they are true of inverses, too.
PLACING = ("grid_mapping", "coordinates")
#: Attributes that describe the numbers themselves, and would be wrong of their inverses; some by how they begin.
_OF_VALUES = frozenset(
    [*SCALES, *FILLS, "valid_range", "valid_min", "valid_max", "actual_range", "standard_name", "cell_methods"]
)
_OF_VALUES_PREFIXES = ("flag_", "STATISTICS_")


def of_inverse(attributes: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the attributes of an array's inverse.

    Examples
    --------
    >>> of_inverse({"units": "m2", "long_name": "covariance", "valid_min": 0.0, "project": "p"})
    {'units': '1/(m2)', 'long_name': 'inverse of covariance', 'project': 'p'}
    """
    found = {
        name: value
        for name, value in attributes.items()
        if name not in _OF_VALUES and not str(name).startswith(_OF_VALUES_PREFIXES)
    }
    units = found.pop("units", None)
    if isinstance(units, str) and " since " not in units:  # Xarray would take the inverse for times, too
        found = {"units": _inverse_units(units)} | found
    if isinstance(found.get("long_name"), str):
        found["long_name"] = f"inverse of {found['long_name']}"
    return found


def _inverse_units(units: str) -> str:
    if units in ("", "1", "dimensionless"):
        return units
    once = re.fullmatch(r"1/\(([^()]*)\)", units)
    return once[1] if once else f"1/({units})"


def packing_of(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the attributes that make the numbers of an array mean others.

    Examples
    --------
    >>> packing_of({"scale_factor": 0.1, "_FillValue": -1, "units": "m"}), packing_of({"_FillValue": float("nan")})
    ({'scale_factor': 0.1, '_FillValue': -1}, {})
    """
    scales = {name: attributes[name] for name in SCALES if name in attributes}
    fills = {name: attributes[name] for name in FILLS if name in attributes}
    # Alone NaN means itself; beside a scale it says that the result is floating.
    return scales | {name: value for name, value in fills.items() if scales or not is_nan(value)}


def refuse_packed(attributes: Mapping[Any, Any], what: str, way_out: str) -> None:
    """Raise TypeError if numbers mean others than they are."""
    packed = packing_of(attributes)
    # GDAL's readers name these of data that are not packed.
    for name, neutral in {"scale_factor": 1, "add_offset": 0}.items():
        if name in packed and np.ndim(packed[name]) == 0 and packed[name] == neutral:
            del packed[name]
    if packing_of(packed):
        raise TypeError(clean(f"{what} is packed, its attributes have {', '.join(packed)}: {way_out}"))


def is_nan(value: Any) -> bool:
    """Tell whether a fill value is NaN, which Xarray stores as a number, as text, or as a float64 in base64."""
    if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value):  # of a complex number, or several
        return len(value) > 0 and all(map(is_nan, value))
    if isinstance(value, str) and value != "NaN":
        try:
            (value,) = struct.unpack("<d", base64.b64decode(value, validate=True))
        except (ValueError, struct.error):
            return False
    if isinstance(value, str):
        return True
    return isinstance(value, (float, complex, np.inexact)) and bool(np.isnan(value))

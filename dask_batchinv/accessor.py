"""Xarray: ``.linalg`` on Dataset and DataArray. Adapters; the work is done in `dask_batchinv.array`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from dask_batchinv.array import CallOptions, invert_any, invert_any_ex
from dask_batchinv.kernels import InverseEx
from dask_batchinv.stack import AssumeA, Device, OnError, result_dtype

Dims = Sequence[Hashable]


def candidate(variable: xr.DataArray) -> tuple[Hashable, Hashable] | None:
    """Return the last two dimensions of a variable if they can be the rows and columns of matrices."""
    if variable.ndim < 2 or variable.shape[-1] != variable.shape[-2] or not _has_inverse(variable):
        return None
    return variable.dims[-2], variable.dims[-1]


def _has_inverse(variable: xr.DataArray) -> bool:
    try:
        result_dtype(variable.dtype)
    except TypeError:
        return False
    return True


def choose_dims(ds: xr.Dataset, dims: Dims | None) -> tuple[Hashable, Hashable]:
    """Return the (row, column) dimensions that are meant for a Dataset, or raise ValueError."""
    if dims is not None:
        return parse_dims(dims)
    found: dict[tuple[Hashable, Hashable], list[Hashable]] = {}
    for name, variable in ds.data_vars.items():
        if (pair := candidate(variable)) is not None:
            found.setdefault(pair, []).append(name)
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise ValueError(
            "no variable ends in two equally long dimensions: name the core dimensions with dims=(row, column); "
            f"the variables have { ({name: v.dims for name, v in ds.data_vars.items()}) }"
        )
    listed = "; ".join(f"dims={pair} (of {', '.join(map(str, names))})" for pair, names in found.items())
    raise ValueError(f"the variables disagree on the core dimensions: pass one of {listed}")


def parse_dims(dims: Dims) -> tuple[Hashable, Hashable]:
    """Return `dims` if it names two different dimensions, else raise ValueError."""
    if isinstance(dims, str) or len(dims) != 2 or dims[0] == dims[1]:
        raise ValueError(f"dims must name two different dimensions, (row, column); got {dims!r}")
    return dims[0], dims[1]


@invert_any.register
def _(a: xr.DataArray, options: CallOptions, out: Any) -> Any:
    return _data_array_inv(a, None, options, out)


@invert_any.register
def _(a: xr.Dataset, options: CallOptions, out: Any) -> Any:
    return _dataset_inv(a, None, options, out)


@invert_any_ex.register
def _(a: xr.DataArray, options: CallOptions) -> InverseEx:
    return _data_array_parts(a, None, options)


@invert_any_ex.register
def _(a: xr.Dataset, options: CallOptions) -> InverseEx:
    raise TypeError("inverse_ex takes DataArrays: pick a variable of the Dataset")


def _data_array_inv(a: xr.DataArray, dims: Dims | None, options: CallOptions, out: Any = None) -> xr.DataArray:
    if out is not None:
        raise TypeError("out= is not for Xarray objects: use .to_zarr on the result")
    core = _core(a, dims)
    result = xr.apply_ufunc(
        lambda stack: invert_any(stack, options, None),
        a,
        input_core_dims=[core],
        output_core_dims=[core],
        dask="allowed",
        keep_attrs=True,
    )
    return _labelled(result.transpose(*a.dims), a)


def _data_array_parts(a: xr.DataArray, dims: Dims | None, options: CallOptions) -> InverseEx:
    core = _core(a, dims)
    inv, info, rcond = xr.apply_ufunc(
        lambda stack: tuple(invert_any_ex(stack, options)),
        a,
        input_core_dims=[core],
        output_core_dims=[core, [], []],
        dask="allowed",
        keep_attrs=True,
    )
    info.attrs, rcond.attrs = {}, {"units": "1"}
    return InverseEx(_labelled(inv.transpose(*a.dims), a), info.rename("info"), rcond.rename("rcond"))


def _data_array_inv_ex(a: xr.DataArray, dims: Dims | None, options: CallOptions) -> xr.Dataset:
    parts = _data_array_parts(a, dims, options)._asdict()
    if taken := [name for name in parts if name in a.coords or name in a.dims]:
        raise ValueError(f"{', '.join(taken)} are names of coordinates or dimensions already: rename those first")
    return xr.Dataset(parts)


def _dataset_inv(ds: xr.Dataset, dims: Dims | None, options: CallOptions, out: Any = None) -> xr.Dataset:
    if out is not None:
        raise TypeError("out= is not for Xarray objects: use .to_zarr on the result")
    core = choose_dims(ds, dims)
    inverted = {}
    for name, variable in ds.data_vars.items():
        # Text with the dimensions of the matrices is their labels, unless it was named as matrices.
        if set(core) <= set(variable.dims) and (dims is not None or _has_inverse(variable)):
            try:
                inverted[name] = _data_array_inv(variable, core, options)
            except (np.linalg.LinAlgError, TypeError) as error:
                error.add_note(f"in variable {name!r}")
                raise
    if not inverted:
        raise ValueError(f"no variable has both dimensions {core}; the Dataset has {tuple(ds.dims)}")
    return ds.assign(inverted)


def _core(a: xr.DataArray, dims: Dims | None) -> tuple[Hashable, Hashable]:
    if dims is None:
        if a.ndim < 2:
            raise np.linalg.LinAlgError(f"expected a stack of matrices (*, n, n), got shape {a.shape}")
        dims = a.dims[-2:]
    row, col = parse_dims(dims)
    if missing := [dim for dim in (row, col) if dim not in a.dims]:
        raise ValueError(f"dims {missing} are not among the dimensions {a.dims}")
    return row, col


def _labelled(result: xr.DataArray, a: xr.DataArray) -> xr.DataArray:
    result.attrs = dict(a.attrs)
    if (units := a.attrs.get("units", "1")) not in ("", "1", 1):
        # The one attribute that would become a lie.
        result.attrs["units"] = f"1/({units})"
    return result


class _InverseMethods:
    """What both accessors share; the docstrings say what differs from `dask_batchinv.inverse`."""

    _obj: Any

    def inv(
        self,
        dims: Dims | None = None,
        *,
        assume_a: AssumeA = "general",
        on_error: OnError = "raise",
        device: Device = "auto",
    ) -> Any:
        """Return the object with every matrix replaced by its inverse.

        Parameters
        ----------
        dims : (row, column), optional
            The core dimensions. By default the last two dimensions of each variable, where they are equally
            long. Variables of a Dataset without them pass through unchanged.
        assume_a, on_error, device
            As in `dask_batchinv.inverse`.

        Returns
        -------
        xarray.Dataset or xarray.DataArray
            Lazy where the data are. Dimension order, names, coordinates and attributes stay, only ``units``
            become ``1/(units)``.

        Raises
        ------
        ValueError
            If `dims` are not there, or were not given and variables disagree on which pair is meant.
        numpy.linalg.LinAlgError, TypeError, SingularMatrixError, DeviceError
            As in `dask_batchinv.inverse`.
        """
        options = CallOptions.parse(assume_a, device, on_error)
        if isinstance(self._obj, xr.Dataset):
            return _dataset_inv(self._obj, dims, options)
        return _data_array_inv(self._obj, dims, options)


@xr.register_dataset_accessor("linalg")  # type: ignore[no-untyped-call]
class DatasetLinalg(_InverseMethods):
    """Inverses of the matrices in a Dataset, as ``ds.linalg``."""

    def __init__(self, ds: xr.Dataset):
        self._obj = ds


def _existing_accessor() -> type:
    """Return the ``.linalg`` that DataArrays have already, to build on.

    xarray_einstats registers one when it is imported. Importing it first makes the order of the user's imports
    not matter: its methods stay, with `inv` replaced.
    """
    with contextlib.suppress(ImportError):
        import xarray_einstats.accessors  # noqa: F401
    return getattr(xr.DataArray, "linalg", object)


def _register_data_array_accessor() -> type:
    base: Any = _existing_accessor()

    class DataArrayLinalg(_InverseMethods, base):  # type: ignore[misc]  # a base known only at run time
        """Inverses of the matrices in a DataArray, as ``da.linalg``, beside what xarray_einstats offers there."""

        def __init__(self, a: xr.DataArray):
            if base is not object:
                super().__init__(a)
            self._obj = a

        def inv_ex(
            self,
            dims: Dims | None = None,
            *,
            check_errors: bool = False,
            assume_a: AssumeA = "general",
            device: Device = "auto",
        ) -> xr.Dataset:
            """Return a Dataset of ``inverse``, ``info`` and ``rcond``; see `dask_batchinv.inverse_ex`.

            Take them by name, ``["info"]``: ``.info`` is a method of every Dataset.

            Parameters
            ----------
            dims : (row, column), optional
                The core dimensions; by default the last two.
            check_errors, assume_a, device
                As in `dask_batchinv.inverse_ex`.
            """
            options = CallOptions.parse(assume_a, device, "raise" if check_errors else "nan")
            return _data_array_inv_ex(self._obj, dims, options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", xr.core.extensions.AccessorRegistrationWarning)
        xr.register_dataarray_accessor("linalg")(DataArrayLinalg)  # type: ignore[no-untyped-call]
    return DataArrayLinalg


DataArrayLinalg = _register_data_array_accessor()

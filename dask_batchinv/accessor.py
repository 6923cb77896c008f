"""Xarray: ``.linalg`` on Dataset, DataArray and DataTree. Adapters; the work is done in `dask_batchinv.labelled`."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Hashable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import xarray as xr

from dask_batchinv.stack import AssumeAWord, Device, OnError, Precision

if TYPE_CHECKING:
    from dask_batchinv.labels import Dims
    from dask_batchinv.options import CallOptions


def _labelled(**words: Any) -> tuple[ModuleType, CallOptions]:
    """Return what does the work, and its options: imported when it is called, for Xarray is imported for much else."""
    from dask_batchinv import labelled
    from dask_batchinv.options import CallOptions

    return labelled, CallOptions.parse(**words)


class _OfSeveral:
    """What the accessors of Datasets and DataTrees share."""

    _obj: Any

    def inv(
        self,
        dims: Dims | None = None,
        *,
        variables: Iterable[Hashable] | None = None,
        assume_a: AssumeAWord = "general",
        lower: bool = False,
        on_error: OnError = "raise",
        check_errors: bool | None = None,
        min_rcond: float = 0.0,
        device: Device = "auto",
        precision: Precision = "same",
    ) -> Any:
        """Return the object with every matrix replaced by its inverse.

        Parameters
        ----------
        dims : (row, column), optional
            The core dimensions. By default the last two of a variable, where nothing else could be meant: no other two
            are equally long with the same labels or none.
        variables : names, optional
            What to invert: by default all floating and complex variables with both dimensions. What is not inverted
            passes unchanged.
        assume_a, lower, on_error, check_errors, min_rcond, device, precision
            As in `dask_batchinv.inverse`.

        Returns
        -------
        xarray.Dataset or xarray.DataTree
            Lazy where the data are. The rows of an inverse are what the columns of the matrix were: if their labels
            are absent or equal, nothing changes; the same labels in another order change places; with
            different labels the names of the dimensions change places too, ``(…, obs, par)`` becomes ``(…, par, obs)``.
            ``units`` become ``1/(units)``, ``long_name`` "inverse of …"; attributes that describe values, as
            ``valid_range`` does, go; all others stay.

        Raises
        ------
        ValueError
            If `dims` or `variables` are not there, or were not given and several pairs could be meant.
        numpy.linalg.LinAlgError, TypeError, SingularMatrixError, DeviceError
            As in `dask_batchinv.inverse`.
        """
        labelled, options = _labelled(
            assume_a=assume_a, lower=lower, on_error=on_error, check_errors=check_errors, min_rcond=min_rcond,
            device=device, precision=precision,
        )  # fmt: skip
        invert = labelled.dataset_inv if isinstance(self._obj, xr.Dataset) else labelled.tree_inv
        return invert(self._obj, dims, options, variables)


@xr.register_dataset_accessor("linalg")  # type: ignore[no-untyped-call]
class DatasetLinalg(_OfSeveral):
    """Inverses of the matrices in a Dataset, as ``ds.linalg``."""

    def __init__(self, ds: xr.Dataset):
        self._obj = ds


@xr.register_datatree_accessor("linalg")  # type: ignore[no-untyped-call]
class DataTreeLinalg(_OfSeveral):
    """Inverses of the matrices in each node of a DataTree, as ``tree.linalg``."""

    def __init__(self, tree: xr.DataTree):
        self._obj = tree


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

    class DataArrayLinalg(base):  # type: ignore[misc]  # a base known only at run time
        """Inverses of the matrices in a DataArray, as ``da.linalg``, beside what xarray_einstats offers there."""

        def __init__(self, a: xr.DataArray):
            if base is not object:
                super().__init__(a)
            self._obj = a

        def inv(
            self,
            dims: Dims | None = None,
            *,
            assume_a: AssumeAWord = "general",
            lower: bool = False,
            on_error: OnError = "raise",
            check_errors: bool | None = None,
            min_rcond: float = 0.0,
            device: Device = "auto",
            precision: Precision = "same",
        ) -> xr.DataArray:
            """Return the DataArray with every matrix replaced by its inverse; see `Dataset.linalg.inv`."""
            labelled, options = _labelled(
                assume_a=assume_a, lower=lower, on_error=on_error, check_errors=check_errors, min_rcond=min_rcond,
                device=device, precision=precision,
            )  # fmt: skip
            inverted: xr.DataArray = labelled.data_array_inv(self._obj, dims, options)
            return inverted

        def inv_ex(
            self,
            dims: Dims | None = None,
            *,
            check_errors: bool | None = None,
            on_error: OnError = "nan",
            assume_a: AssumeAWord = "general",
            lower: bool = False,
            min_rcond: float = 0.0,
            device: Device = "auto",
            precision: Precision = "same",
            logdet: bool = False,
        ) -> xr.Dataset:
            """Return a Dataset of ``inverse``, ``info`` and ``rcond``; see `dask_batchinv.inverse_ex`.

            Take them by name, ``["info"]``: ``.info`` is a method of every Dataset.

            Parameters
            ----------
            dims : (row, column), optional
                The core dimensions; by default the last two, where nothing else could be meant.
            check_errors, on_error, assume_a, lower, min_rcond, device, precision, logdet
                As in `dask_batchinv.inverse_ex`; with `logdet` the Dataset has ``sign`` and ``logdet`` too.
            """
            labelled, options = _labelled(
                assume_a=assume_a, lower=lower, on_error=on_error, check_errors=check_errors, min_rcond=min_rcond,
                device=device, precision=precision, logdet=logdet,
            )  # fmt: skip
            account: xr.Dataset = labelled.data_array_inv_ex(self._obj, dims, options)
            return account

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", xr.core.extensions.AccessorRegistrationWarning)
        xr.register_dataarray_accessor("linalg")(DataArrayLinalg)  # type: ignore[no-untyped-call]
    return DataArrayLinalg


DataArrayLinalg = _register_data_array_accessor()
# What Python calls them in an error: as they are called.
_OfSeveral.inv.__qualname__ = "linalg.inv"
for _method in (DataArrayLinalg.inv, DataArrayLinalg.inv_ex):  # type: ignore[attr-defined]  # known at run time
    _method.__qualname__ = f"DataArray.linalg.{_method.__name__}"

if hasattr(sys.modules.get("dask_batchinv.array"), "invert_any_ex"):
    # `inverse` was imported before Xarray, whose objects it takes, too. If that is only under way, it comes after this.
    from dask_batchinv import labelled  # noqa: F401

"""The table of containers: how an array of another package is opened, and how the results are closed again.

Packages are recognised by the names of their types and never imported here unless one of their arrays came in.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dask_batchinv import torch_tensors
from dask_batchinv.attributes import of_inverse, refuse_packed
from dask_batchinv.kernels import AnyInverseEx
from dask_batchinv.kernels.device import is_gpu_array
from dask_batchinv.options import CallOptions
from dask_batchinv.stack import check_shape, result_dtype

#: What becomes of a result: ``close(part, value)``, where the part is "inverse", "info" or "rcond".
Close = Callable[[str, Any], Any]


class Opened(NamedTuple):
    """What was in a container."""

    stack: Any
    """An array of a kind that is nearer to NumPy's; it may be a container itself."""
    close: Close
    """Makes of each result what belongs to the container."""
    missing: Any = None
    """Which matrices are missing, shape ``(*,)``: they raise no error."""

    def closed(self, results: AnyInverseEx) -> AnyInverseEx:
        """Return results as those of the container."""
        return type(results)(*(self.close(part, value) for part, value in results._asdict().items()))


@dataclass(frozen=True)
class Container:
    """One kind of array."""

    types: tuple[str, ...]
    """Its types, as ``package.module:Name``."""
    open: Callable[[Any, CallOptions], Opened]
    """Opens it."""
    takes_out: bool = False
    """Whether its inverse can be written to an ``out`` of NumPy's kind."""

    def includes(self, a: Any) -> bool:
        """Tell whether an object is of this kind."""
        return any(_is_a(a, name) for name in self.types)


def _is_a(a: Any, name: str) -> bool:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is not None and isinstance(a, found)


def _as_is(part: str, value: Any) -> Any:
    return value


# --- how each is opened ---------------------------------------------------------------------------------------


def _open_tensor(a: Any, options: CallOptions) -> Opened:
    stack, close = torch_tensors.opened(a, options.assume_a, lower=options.lower)
    return Opened(stack, close)


def open_masked(a: Any, options: CallOptions) -> Opened:
    """Open NumPy's masked array."""
    if type(a) is not np.ma.MaskedArray:  # that of astropy has units
        raise TypeError(_unknown(a))
    n = check_shape(a.shape)
    mask = np.ma.getmaskarray(a)
    # A matrix is missing whole if a number is missing that would be read.
    batch = mask.shape[:-2]
    missing = options.read(mask.reshape(math.prod(batch), n, n).astype("f4")).any((-2, -1)).reshape(batch)

    def close(part: str, value: Any) -> Any:
        own = missing[..., None, None] if part == "inverse" else missing
        return np.ma.MaskedArray(value, np.broadcast_to(own, np.shape(value)).copy())

    return Opened(missing_as_nan(a), close, missing)


def _open_astropy_masked(a: Any, options: CallOptions) -> Opened:
    return Opened(_filled(a.unmasked, a.mask), _as_is)


def _magnitude(numbers: Any, options: CallOptions) -> Any:
    if options.logdet:
        raise TypeError("the logarithm of a determinant cannot have units: pass the numbers themselves")
    return numbers


def _of_inverse(with_units: Callable[[Any], Any]) -> Close:
    return lambda part, value: with_units(value) if part == "inverse" else value


def _open_quantity(a: Any, options: CallOptions) -> Opened:
    units = a.units**-1
    # pint itself says so of degrees above a zero, or decibels; or it converts them, which we do not.
    if (1 / type(a)(1.0, a.units)).units != units:
        raise TypeError(f"there are no matrices in {a.units}, whose zero is not 0: convert them, with .to_base_units()")
    return Opened(_magnitude(a.magnitude, options), _of_inverse(lambda value: type(a)(value, units)))


def _open_astropy_quantity(a: Any, options: CallOptions) -> Opened:
    from astropy.units import Quantity

    unit = a.unit**-1
    return Opened(_magnitude(a.value, options), _of_inverse(lambda value: Quantity(value, unit, copy=False)))


def _open_jax(a: Any, options: CallOptions) -> Opened:
    import jax

    if isinstance(a, jax.core.Tracer):
        raise TypeError(
            "dask_batchinv computes outside of JAX, and not inside jit, grad or vmap: call it on the arrays "
            "themselves, or use jax.numpy.linalg.inv there"
        )
    devices = a.devices()
    device = next(iter(devices)) if len(devices) == 1 else None
    return Opened(np.asarray(a), lambda part, value: jax.device_put(value, device))


def _open_data_frame(a: Any, options: CallOptions) -> Opened:
    import pandas as pd

    # Columns of pandas's own dtypes say what they are of NumPy's, and hold what is missing besides.
    dtypes = [getattr(dtype, "numpy_dtype", dtype) for dtype in a.dtypes]  # a name may be there twice
    if wrong := [name for name, dtype in zip(a.columns, dtypes, strict=True) if not _is_number(dtype)]:
        raise TypeError(
            f"the columns {wrong} of the DataFrame are not numbers, or sparse: leave them out, or convert them"
        )
    dtype = np.result_type(*dtypes) if dtypes else np.dtype("f8")
    if a.isna().any(axis=None):
        dtype = result_dtype(dtype)
    stack = a.to_numpy(dtype=dtype, **({"na_value": np.nan} if dtype.kind in "fc" else {}))

    def close(part: str, value: Any) -> Any:
        if part != "inverse":
            return value
        # The rows of the inverse are what the columns were.
        frame = pd.DataFrame(value, index=a.columns, columns=a.index)
        frame.attrs = of_inverse(a.attrs)
        return frame

    return Opened(stack, close)


def _is_number(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "biufc"


def _open_netcdf(a: Any, options: CallOptions) -> Opened:
    if not (a.mask and a.scale):
        refuse_packed(
            {name: a.getncattr(name) for name in a.ncattrs()}, "this netCDF4.Variable", "set_auto_maskandscale(True)"
        )
    return Opened(missing_as_nan(a[...]), _as_is)


def _open_subclass(a: Any, options: CallOptions) -> Opened:
    kind = type(a)
    # A class that only has another name, or NumPy's own: what else a class may carry along would be lost or wrong.
    plain = not any({"__array_finalize__", "__array_wrap__", "__array_ufunc__", "__array_function__"} & set(vars(cls))
                    for cls in kind.__mro__[: kind.__mro__.index(np.ndarray)])  # fmt: skip
    if isinstance(a, (np.memmap, np.recarray)):
        return Opened(a.view(np.ndarray), _as_is)
    if isinstance(a, np.matrix) or plain:
        return Opened(a.view(np.ndarray), lambda part, value: value.view(kind) if part == "inverse" else value)
    raise TypeError(_unknown(a))


def _open_sequence(a: Any, options: CallOptions) -> Opened:
    return Opened(np.asarray(_plain(a)), _as_is)


def _plain(item: Any) -> Any:
    """Return a nested sequence with nothing in it but numbers and plain arrays."""
    if isinstance(item, (list, tuple)):
        return [_plain(one) for one in item]
    if type(item) is np.ma.MaskedArray or item is np.ma.masked:
        return missing_as_nan(item)
    if isinstance(item, (numbers.Number, np.generic, str, bytes)) or item is None or type(item) is np.ndarray:
        return item
    if isinstance(item, np.ndarray):
        return _open_subclass(item, None).stack  # type: ignore[arg-type]  # it needs none
    raise TypeError(f"a list holds {_name(item)}: stack its items first, with the function of their package for that")


#: The first that fits is taken.
CONTAINERS = (
    Container(("torch:Tensor",), _open_tensor),
    Container(("numpy.ma:MaskedArray",), open_masked),
    Container(("astropy.utils.masked:Masked",), _open_astropy_masked, takes_out=True),
    Container(("astropy.units:Quantity",), _open_astropy_quantity),
    Container(("pint:Quantity", "pint.facets.plain:PlainQuantity"), _open_quantity),
    Container(("jax:Array",), _open_jax),
    Container(("pandas:DataFrame",), _open_data_frame),
    Container(("netCDF4:Variable",), _open_netcdf, takes_out=True),
    Container(("numpy:ndarray",), _open_subclass, takes_out=True),
    Container(("builtins:list", "builtins:tuple"), _open_sequence, takes_out=True),
)

#: What is refused, and the way out.
REFUSED = (
    (("builtins:str", "builtins:bytes", "os:PathLike"), "a path. Open it, with zarr.open_array(path) or "
     "xarray.open_zarr(path) for example, or run a job: dask_batchinv.invert_store(path, target)"),
    (("zarr:Group",), "a group. Pick an array of it, group['name'], or open it with xarray.open_zarr"),
    (("scipy.sparse:sparray", "scipy.sparse:spmatrix"), "sparse, and inverses are dense: pass a.toarray()"),
    (("sparse:SparseArray",), "sparse, and inverses are dense: pass a.todense(), or of Dask blocks "
     "a.map_blocks(lambda block: block.todense())"),
    (("cubed:Array",), "an array of cubed: pass a.compute(), or the Zarr array that it was made from"),
    (("h5py:Dataset", "h5netcdf:Variable"), "a variable in a file: open that with xarray.open_dataset, which decodes "
     "packed numbers; or pass a[...] if they are what they are"),
    (("dask.dataframe:DataFrame",), "a Dask DataFrame: pass a.to_dask_array(lengths=True)"),
    (("dask.delayed:Delayed",), "delayed: pass dask.array.from_delayed(a, shape, dtype)"),
    (("pandas:Series",), "a Series: pass the array or the DataFrame with the matrix"),
)  # fmt: skip


def open_container(a: Any, options: CallOptions) -> tuple[Container, Opened] | None:
    """Open what `inverse` was given; None if it is a number.

    Raises
    ------
    TypeError
        If it is not in the table, with what to do.
    """
    for types, advice in REFUSED:
        if any(_is_a(a, name) for name in types):
            raise TypeError(f"expected a stack of matrices, got {_name(a)}, which is {advice}")
    for container in CONTAINERS:
        if container.includes(a):
            return container, container.open(a, options)
    if isinstance(a, (numbers.Number, np.generic, memoryview)):
        return None
    raise TypeError(_unknown(a))


def _unknown(a: Any) -> str:
    return (
        f"expected a stack of matrices, got {_name(a)}, which may hold more than numbers: pass numpy.asarray(a) if "
        "its numbers alone are meant, and put back what it carries yourself"
    )


def _name(a: Any) -> str:
    kind = type(a)
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}".removeprefix("builtins.")


# --- blocks of Dask arrays ------------------------------------------------------------------------------------


def check_meta(meta: Any) -> None:
    """Raise TypeError unless blocks like `meta` have inverses here."""
    if type(meta) not in (np.ndarray, np.ma.MaskedArray) and not is_gpu_array(meta):
        raise TypeError(f"expected a Dask array of NumPy or CuPy blocks: {_refusal(meta)}")


def plain_block(block: Any) -> Any:
    """Return a block as NumPy's or CuPy's, with NaN for what is masked; TypeError for blocks of other kinds."""
    if type(block) is np.ndarray or is_gpu_array(block):
        return block
    if type(block) is np.ma.MaskedArray:
        return missing_as_nan(block)
    if _is_a(block, "astropy.utils.masked:Masked") and not hasattr(block, "unit"):
        return _filled(block.unmasked, block.mask)
    if isinstance(block, (np.memmap, np.generic)):
        return np.asarray(block)
    raise TypeError(_refusal(block))


def _refusal(a: Any) -> str:
    for types, advice in REFUSED:
        if any(_is_a(a, name) for name in types):
            return f"{_name(a)} is {advice}"
    return (
        f"{_name(a)} may hold more than numbers: convert the blocks first, with a.map_blocks(numpy.asarray) if that "
        "loses nothing"
    )


# --- what is missing ------------------------------------------------------------------------------------------


def missing_as_nan(a: Any) -> Any:
    """Return the numbers of an array that may be NumPy's masked one as a plain one, NaN for what is masked."""
    return _filled(np.ma.getdata(a), np.ma.getmask(a)) if isinstance(a, np.ma.MaskedArray) else np.asarray(a)


def _filled(values: Any, mask: Any) -> Any:
    if not np.any(mask):
        return values
    filled = values.astype(result_dtype(values.dtype))
    filled[np.broadcast_to(mask, filled.shape)] = np.nan
    return filled

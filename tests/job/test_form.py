"""Matrices that do not stand as (*, n, n): packed triangles, real and imaginary parts in two places."""

import itertools
import json

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from dask_batchinv import inverse, invert_store, verify_store
from dask_batchinv.cli import main
from dask_batchinv.job.api import JobFailedError
from dask_batchinv.outcome import SourceError, TargetError
from tests.support.stacks import assert_same_bits, conditioned
from tests.support.targets import read_target

ORDERS = [f"{triangle} by {order}" for triangle, order in itertools.product(("lower", "upper"), ("rows", "columns"))]


def pack(a, packed):
    """Write a triangle down, number by number."""
    n = a.shape[-1]
    lower, by_rows = packed.startswith("lower"), packed.endswith("rows")
    places = [(i, j) for i in range(n) for j in range(n) if (j <= i if lower else j >= i)]
    places.sort(key=lambda place: place if by_rows else place[::-1])
    return np.stack([a[..., i, j] for i, j in places], axis=-1)


def store(path, **arrays):
    group = zarr.create_group(path)
    for name, (dims, values, chunks) in arrays.items():
        group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=chunks or values.shape, dimension_names=dims
        )[...] = values
    return path


def check(source, target, expected, **options):
    report = invert_store(source, target, tile_size=2000, **options)
    assert report.complete
    assert_same_bits(read_target(target)[0], expected)
    verified = verify_store(target, source=source)
    assert verified.ok, str(verified)
    assert invert_store(source, target, tile_size=2000, **options).tiles_now == 0
    assert CliRunner().invoke(main, ["status", str(target)]).exit_code == 0


@pytest.mark.parametrize("packed", ORDERS)
@pytest.mark.parametrize("assume_a", ["symmetric", "positive definite", "general"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_symmetric(tmp_path, packed, assume_a, n):
    a = conditioned(30, n, 10, structure="positive definite").reshape(5, 6, n, n)
    a = (a + a.swapaxes(-2, -1)) / 2
    values = pack(a, packed)
    store(tmp_path / "s", p=(("y", "x", "p"), values, (2, 3, values.shape[-1])))
    check(tmp_path / "s", tmp_path / "t", inverse(a, assume_a=assume_a), variable="p", packed=packed, assume_a=assume_a)
    found = xr.open_zarr(tmp_path / "t", consolidated=False)
    assert found.inverse.dims == ("y", "x", "row", "col")


@pytest.mark.parametrize("packed", ORDERS)
@pytest.mark.parametrize("assume_a", ["hermitian", "symmetric"])
def test_complex(tmp_path, packed, assume_a):
    a = conditioned(30, 3, 10, "complex64", assume_a)
    if assume_a == "hermitian":
        a = ((a + a.conj().swapaxes(-2, -1)) / 2).astype(a.dtype)
    else:
        a = ((a + a.swapaxes(-2, -1)) / 2).astype(a.dtype)
    values = pack(a, packed)
    store(tmp_path / "s", p=((None, "p"), values, (7, 4)))  # a triangle in two chunks
    check(tmp_path / "s", tmp_path / "t", inverse(a, assume_a=assume_a), variable="p", packed=packed, assume_a=assume_a)


@pytest.mark.parametrize("triangle", ["lower", "upper"])
def test_triangular(tmp_path, triangle):
    a = conditioned(10, 4, 10, structure=f"{triangle} triangular")
    store(tmp_path / "s", p=(("t", "p"), pack(a, f"{triangle} by rows"), None))
    options = {"packed": f"{triangle} by rows", "assume_a": f"{triangle} triangular", "variable": "p"}
    check(tmp_path / "s", tmp_path / "t", inverse(a, assume_a=f"{triangle} triangular"), **options)


def test_the_packed_dimension_may_be_any(tmp_path):
    a = conditioned(30, 3, 10, structure="positive definite").reshape(5, 6, 3, 3)
    values = np.moveaxis(pack(a, "upper by rows"), -1, 0)
    store(tmp_path / "s", p=(("p", "y", "x"), values, (6, 2, 6)))
    options = {"variable": "p", "packed": "upper by rows", "dims": ("p",), "assume_a": "pos"}
    check(tmp_path / "s", tmp_path / "t", inverse(a, assume_a="pos"), **options)


@pytest.mark.parametrize("place", [-1, 0, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
def test_parts_along_a_dimension(tmp_path, place, dtype):
    a = conditioned(20, 3, 10, "complex128")
    both = np.stack([a.real, a.imag], axis=place)
    both = (both * 1000).astype(dtype) if dtype == "int16" else both.astype(dtype)
    a = np.take(both, 0, place) + 1j * np.take(both, 1, place)
    dims = ["t", "row", "col"]
    dims.insert(place % 4 if place >= 0 else 3, "part")
    store(tmp_path / "s", z=(dims, both, tuple({"t": 6}.get(dim, 3 if dim != "part" else 1) for dim in dims)))
    a = a.astype("complex64" if dtype == "float32" else "complex128")
    check(tmp_path / "s", tmp_path / "t", inverse(a), variable="z", complex_dim="part")


def test_parts_in_two_arrays(tmp_path):
    a = conditioned(20, 3, 10, "complex64")
    dims = ("t", "row", "col")
    store(tmp_path / "s", re=(dims, a.real.copy(), (6, 3, 3)), im=(dims, a.imag.copy(), (4, 3, 3)))
    options = {"variable": "re", "imag": "im"}
    check(tmp_path / "s", tmp_path / "t", inverse(a), **options)
    zarr.open_group(tmp_path / "s")["im"][9] = 0
    report = invert_store(tmp_path / "s", tmp_path / "t", tile_size=2000, **options)
    assert report.changed_tiles >= 1
    a[9] = a[9].real
    assert_same_bits(read_target(tmp_path / "t")[0], inverse(a))
    # A chunk of either that is damaged costs the matrices that are in it.
    (tmp_path / "s/im/c/1/0/0").write_bytes(b"damaged")
    with pytest.raises(JobFailedError) as raised:
        invert_store(tmp_path / "s", tmp_path / "u", **options)
    assert [chunk.key for chunk in raised.value.report.bad_chunks] == ["im/c/1/0/0"]
    assert np.flatnonzero(read_target(tmp_path / "u")[1] == -4).tolist() == [4, 5, 6, 7]


PACKING = {"dtype": "i2", "scale_factor": 0.5, "_FillValue": -(2**15)}


def test_packed_in_every_sense(tmp_path):
    """Triangles of Hermitian matrices, in two arrays of packed integers; a part of them is wanted, some are masked."""
    a = conditioned(24, 3, 4, "complex128", "hermitian").reshape(6, 4, 3, 3)
    values = pack(a, "lower by rows")
    ints = {name: np.rint(part * 1000).astype("i2") for name, part in {"re": values.real, "im": values.imag}.items()}
    xr.Dataset(
        {name: (("y", "x", "p"), part * 0.5) for name, part in ints.items()}
        | {"mask": (("x",), np.array([False, True, False, False]))},
        {"y": np.arange(6) * 10, "p": np.arange(6)},
    ).to_zarr(tmp_path / "s", encoding={name: PACKING for name in ints}, consolidated=False)
    options = {
        "variable": "re", "imag": "im", "packed": "lower by rows", "assume_a": "her", "mask": "mask",
        "select": {"y": slice(20, 40)},
    }  # fmt: skip
    invert_store(tmp_path / "s", tmp_path / "t", max_failed=None, **options)
    found = xr.open_zarr(tmp_path / "t", consolidated=False).load()
    assert found.y.values.tolist() == [20, 30, 40]
    assert "p" not in found.coords
    whole = np.zeros((6, 4, 3, 3), complex)
    row, col = np.tril_indices(3)
    whole[..., row, col] = (ints["re"] + 1j * ints["im"]) * 0.5
    expected = inverse(whole, assume_a="her", lower=True)[2:5]
    kept = [0, 2, 3]
    assert (found["info"].values[:, 1] == -5).all()
    np.testing.assert_allclose(found.inverse.values[:, kept], expected[:, kept], rtol=1e-12, atol=1e-12)
    assert verify_store(tmp_path / "t", source=tmp_path / "s").ok


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("fields", [("r", "i"), ("real", "imag")])
@pytest.mark.filterwarnings("ignore:.*does not have a Zarr")
def test_records_are_complex_numbers(tmp_path, zarr_format, fields):
    a = conditioned(20, 3, 10, "complex64")
    records = np.zeros(a.shape, [(name, "<f4") for name in fields])
    records[fields[0]], records[fields[1]] = a.real, a.imag
    array = zarr.create_array(
        tmp_path / "s", shape=a.shape, dtype=records.dtype, chunks=(6, 3, 3), zarr_format=zarr_format
    )
    array[...] = records
    check(tmp_path / "s", tmp_path / "t", inverse(a))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "no square matrices.*packed triangles of 3 x 3 matrices, say so with `packed=`"),
        ({"packed": "lower by rows", "dims": ("t",)}, "no triangle has so many numbers"),
        ({"packed": "lower by rows", "dims": ("t", "p")}, "`dims=` takes 1 of t, p"),
        ({"packed": "lower by lines"}, "packed must be one of"),
        ({"complex_dim": "p"}, "a dimension of length 2; there are t 4, p 6"),
        ({"imag": "nothing", "packed": "lower by rows"}, "no array 'nothing' of imaginary parts"),
        ({"imag": "z", "packed": "lower by rows"}, "z has other dimensions"),
        ({"imag": "p", "packed": "lower by rows"}, "pass `assume_a='her'` or"),
    ],
)
def test_refused(tmp_path, options, why):
    store(tmp_path / "s", p=(("t", "p"), np.ones((4, 6)), None), z=(("t",), np.ones(4), None))
    with pytest.raises((SourceError, ValueError), match=why):
        invert_store(tmp_path / "s", tmp_path / "t", variable="p", **options)
    assert not (tmp_path / "t").exists()


def test_another_form_is_another_job_and_the_command_line(tmp_path):
    a = conditioned(10, 3, 10, structure="positive definite")
    a = (a + a.swapaxes(-2, -1)) / 2
    store(tmp_path / "s", p=(("t", "p"), pack(a, "lower by rows"), None))
    run = ["run", str(tmp_path / "s"), str(tmp_path / "t"), "--variable", "p", "--assume-a", "pos", "--json", "--quiet"]
    ran = CliRunner().invoke(main, [*run, "--packed", "lower by rows"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["matrices"] == 10
    assert_same_bits(read_target(tmp_path / "t")[0], inverse(a, assume_a="pos"))
    with pytest.raises(TargetError, match="packed was 'lower by rows', is 'upper by rows'"):
        invert_store(tmp_path / "s", tmp_path / "t", variable="p", assume_a="pos", packed="upper by rows")


# --- inverses in the form of the source -----------------------------------------------------------------------


@pytest.mark.parametrize("packed", ORDERS)
@pytest.mark.parametrize("encoding", [{}, {"compress": "zstd"}, {"shards": {"y": 4}, "chunks": {"y": 2}}])
def test_triangles_come_back_as_triangles(tmp_path, packed, encoding):
    a = conditioned(30, 3, 10, structure="positive definite").reshape(5, 6, 3, 3)
    a = (a + a.swapaxes(-2, -1)) / 2
    store(tmp_path / "s", p=(("y", "x", "p"), pack(a, packed), (2, 3, 6)))
    options = {"variable": "p", "packed": packed, "assume_a": "pos", "like_source": True, **encoding}
    expected = pack(inverse(a, assume_a="pos"), packed)
    check(tmp_path / "s", tmp_path / "t", expected, **options)
    found = xr.open_zarr(tmp_path / "t", consolidated=False)
    assert found.inverse.dims == ("y", "x", "p")
    # And that is a source again.
    report = invert_store(tmp_path / "t", tmp_path / "u", variable="inverse", packed=packed, assume_a="pos")
    assert report.complete
    np.testing.assert_allclose(read_target(tmp_path / "u")[0], a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.filterwarnings("ignore:Both zarr.json", "ignore:Object at", "ignore:Consolidated metadata")
def test_parts_come_back_as_parts(tmp_path, zarr_format):
    a = conditioned(20, 3, 10, "complex64")
    a[3] = 0
    dims = ("t", "row", "col")
    both = np.stack([a.real, a.imag], axis=-1)
    store(
        tmp_path / "s", z=((*dims, "part"), both, (6, 3, 3, 2)), re=(dims, a.real.copy(), (6, 3, 3)),
        im=(dims, a.imag.copy(), (4, 3, 3)),
    )  # fmt: skip
    more = {"like_source": True, "zarr_format": zarr_format, "max_failed": None}
    good = a.any(axis=(1, 2))
    x = np.full_like(a, complex(np.nan, np.nan))
    x[good] = inverse(a[good])
    expected = np.stack([x.real, x.imag], axis=-1)
    check(tmp_path / "s", tmp_path / "t", expected, variable="z", complex_dim="part", **more)
    check(tmp_path / "s", tmp_path / "u", x.real, variable="re", imag="im", **more)
    found = xr.open_zarr(tmp_path / "u", consolidated=False, zarr_format=zarr_format)
    assert_same_bits(found["imag"].values, x.imag)
    assert found.inverse.dtype == np.float32
    assert xr.open_zarr(tmp_path / "t", consolidated=False, zarr_format=3).inverse.dims == (*dims, "part")


def test_only_what_has_a_form_can_be_like_it(tmp_path):
    store(tmp_path / "s", p=(("t", "i", "j"), np.ones((4, 2, 2)), None))
    with pytest.raises(ValueError, match="inverses like the source are for packed"):
        invert_store(tmp_path / "s", tmp_path / "t", like_source=True)

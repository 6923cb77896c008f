"""`verify_store` finds what is not right in a target, and nothing else."""

import re

import numpy as np
import pytest
import zarr

from dask_batchinv import TargetError, inverse_ex, invert_store, verify_store
from dask_batchinv.job.target.found import inspect
from dask_batchinv.job.target.ledger import COLUMNS
from dask_batchinv.job.target.state import State
from dask_batchinv.job.worker.verify_tiles import residual_ratios
from dask_batchinv.kernels import GENERATION
from dask_batchinv.location import Location
from tests.support.stacks import assert_same_bits, conditioned, residual_ratio
from tests.support.targets import tree


def test_verify_finds_any_flipped_bit(done, client):
    source, path = done
    rng = np.random.default_rng(0)
    for name in ("inverse/c.2.0.0", "info/c.2", "rcond/c.2"):
        content = (path / name).read_bytes()
        for _ in range(5):
            flipped = bytearray(content)
            flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            (path / name).write_bytes(flipped)
            report = verify_store(path, client=client)
            assert not report.ok
            assert [tile.number for tile in report.bad_tiles] == [2]
        (path / name).unlink()
        assert [tile.cause for tile in verify_store(path, client=client).bad_tiles] == [
            f"MissingChunkError: {name} of the target is missing"
        ]
        (path / name).write_bytes(content)
    assert verify_store(path, source=source, client=client).ok


def test_what_rots_without_a_trace_is_repaired_by_the_run_after_verify(tmp_path, make_source, monkeypatch):
    """A bit of a disk, which changes no time of the file: a run that looks at times alone has nothing to do."""
    monkeypatch.setattr("dask_batchinv.job.seen.mark_of", lambda array, key, says: len(f"{array}/{key}") + says.size)
    source, path = make_source(conditioned(40, 3, 10)), tmp_path / "t"
    invert_store(source, path, tile_size=720)
    before = tree(path / "inverse")
    content = bytearray((path / "inverse/c.2.0.0").read_bytes())
    content[9] ^= 1
    (path / "inverse/c.2.0.0").write_bytes(content)
    assert invert_store(source, path, tile_size=720).tiles_now == 0
    assert [tile.number for tile in verify_store(path).bad_tiles] == [2]
    report = invert_store(source, path, tile_size=720)
    assert [tile.number for tile in report.damaged_tiles] == [2]
    assert report.tiles_now == 1
    assert tree(path / "inverse") == before
    assert verify_store(path, source=source).ok


def change(path, name, index, value):
    array = zarr.open_array(path / name, config={"write_empty_chunks": True})
    array[index] = value


@pytest.mark.parametrize(
    ("name", "index", "value", "problem"),
    [
        ("inverse", (13, 0, 0), 7.0, r"matrices are not the inverses.*\(1 of them, first \(13,\)\)"),
        ("inverse", (13, 0, 0), np.nan, r"but their inverse is not finite \(1 of them, first \(13,\)\)"),
        ("inverse", (11, 0, 0), 1.0, r"failed, but their inverse is not NaN \(1 of them, first \(11,\)\)"),
        ("info", (12,), -(2**31), "never computed"),
        ("rcond", (11,), 0.5, r"singular, but their rcond is not 0"),
        ("rcond", (12,), np.nan, r"good, but their rcond is not between 0 and 1 \(1 of them, first \(12,\)\)"),
    ],
)
def test_verify_finds_wrong_numbers_with_right_checksums(done, client, name, index, value, problem):
    source, path = done
    change(path, name, index, value)
    report = verify_store(path, source=source, client=client)
    assert not report.ok
    assert len(report.bad_tiles) == 1
    assert report.bad_tiles[0].number == 1
    assert re.search(problem, report.bad_tiles[0].cause)


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ("singular", "1 singular, but the ledger says 3"),
        ("rcond_crc32c", "rcond is not what was written"),
        ("generation", "not recorded in the ledger: run the job again"),
    ],
)
def test_verify_compares_with_the_ledger(done, client, column, problem):
    _, path = done
    index = (1, COLUMNS.index(column))
    array = zarr.open_array(path / "ledger" / "tiles")
    change(path, "ledger/tiles", index, 0 if column == "generation" else array[index] + 2)
    report = verify_store(path, client=client)
    assert [tile.cause for tile in report.bad_tiles] == [problem]
    # Of what is not recorded nothing is known to be right.
    assert report.tiles_read == report.tiles - (column == "generation")


def test_verify_of_an_unfinished_target(tmp_path, make_source, client):
    source = make_source(conditioned(40, 3, 10), chunks=(10, 3, 3))

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invert_store(source, tmp_path / "t", client=client, tile_size=720, on_progress=stop)
    report = verify_store(tmp_path / "t", client=client)
    assert not report.ok
    assert not report.complete
    assert "no: run the job again" in str(report)


def test_verify_refuses_what_does_not_belong_together(done, make_source, client, tmp_path):
    _, path = done
    other = make_source(conditioned(30, 3, 10), name="other")
    with pytest.raises(TargetError, match=r"was made from .*source.zarr"):
        verify_store(path, source=other, client=client)
    with pytest.raises(TargetError, match=r"there is nothing at"):
        verify_store(tmp_path / "nothing", client=client)


def test_residuals_of_verify_are_those_of_lapack():
    for cond in (10, 1e10):
        a = conditioned(30, 5, cond)
        # Errors well above what the measuring itself, in double precision, adds.
        x = inverse_ex(a).inverse * (1 + 1e-14 * np.random.default_rng(0).normal(size=a.shape))
        np.testing.assert_allclose(residual_ratios(a, x), residual_ratio(a, x, worse=False), rtol=0.2)
        for power in (-900, 900):
            scaled = residual_ratios(np.ldexp(a, power), np.ldexp(x, -power))
            assert_same_bits(scaled, residual_ratios(a, x))


@pytest.mark.parametrize("dtype", ["f4", "f8", "c8", "c16"])
def test_matrices_at_the_ends_of_the_range_are_verified(tmp_path, make_source, client, dtype):
    finfo = np.finfo(dtype)
    a = np.array([[[0.9, 0.5], [-0.5, 0.9]], [[0.9, 0.0], [0.0, 0.8]], [[0.5, 0.4], [0.3, -0.9]]]).astype(dtype)
    if a.dtype.kind == "c":
        a *= 1 + 0.99j
    source = make_source(np.concatenate([a * finfo.max, a * (4 * finfo.tiny)]), chunks=(2, 2, 2))
    report = invert_store(source, tmp_path / "t", client=client)
    assert report.failed == dict.fromkeys(report.failed, 0)
    assert verify_store(tmp_path / "t", source=source, client=client).ok


def test_what_is_known_of_a_target(tmp_path, make_source, client):
    assert inspect(Location.parse(tmp_path / "nothing")).state is State.ABSENT
    invert_store(make_source(conditioned(4, 3, 10)), tmp_path / "t", client=client)
    target = inspect(Location.parse(tmp_path / "t"))
    assert target.state is State.COMPLETE
    assert target.fingerprint["assume_a"] == "general"
    assert target.fingerprint["generation of the kernel"] == GENERATION


def test_of_many_tiles_that_are_not_recorded_the_first_are_named(tmp_path, make_source, client):
    source = make_source(conditioned(130, 3, 10), chunks=(1, 3, 3))
    invert_store(source, tmp_path / "t", client=client, tile_size=72)
    (tmp_path / "t/ledger/tiles/c/0/0").unlink()
    report = verify_store(tmp_path / "t", client=client)
    assert (len(report.bad_tiles), report.tiles_read, report.ok) == (100, 0, False)
    assert any("130 tiles are not recorded in the ledger, of which 100 are named" in each for each in report.problems)

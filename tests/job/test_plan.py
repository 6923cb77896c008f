"""The planner: integers in, tiles out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_batchinv import PlanError
from dask_batchinv.job.plan.plan import (
    IDLE_WORKER_NBYTES,
    LARGEST_TILE,
    USABLE,
    Limits,
    StackLayout,
    make_plan,
    project_memory,
)

MIB = 2**20
UNLIMITED = Limits(memory=None, threads=1, scratch=0, read_concurrency=10)


def layout(shape, unit, core=None, **options):
    core = core or (len(shape) - 2, len(shape) - 1)
    return StackLayout(
        shape,
        core,
        unit,
        **{
            "itemsize_in": 8,
            "itemsize_out": 8,
            "nbytes_per_matrix": 8 * shape[core[0]] ** 2 + 12,
            "nbytes_beside": 12,
            "needs_copy": False,
        }
        | options,
    )


@pytest.mark.parametrize(
    ("shape", "unit", "nbytes", "tile"),
    [
        # Grows by whole chunks, fastest axis first.
        ((1000, 4, 4), (10, 4, 4), 100 * 128, (100, 4, 4)),
        ((1000, 4, 4), (10, 4, 4), 119 * 128, (110, 4, 4)),
        ((50, 60, 2, 2), (5, 6, 2, 2), 5 * 30 * 32, (5, 30, 2, 2)),
        ((50, 60, 2, 2), (5, 6, 2, 2), 20 * 60 * 32, (20, 60, 2, 2)),
        # Stays one chunk rather than cut it.
        ((1000, 4, 4), (10, 4, 4), 3 * 128, (10, 4, 4)),
        # A chunk much too large is cut so that its bounds stay.
        ((1000, 4, 4), (100, 4, 4), 128, (3, 4, 4)),
        ((1000, 4, 4), (96, 4, 4), 5 * 128, (12, 4, 4)),
        # Core dimensions become whole, wherever they stand.
        ((1000, 4, 4), (10, 2, 2), 10 * 128, (10, 4, 4)),
        ((4, 1000, 4), (4, 10, 1), 20 * 128, (4, 20, 4)),
        # No more than there is.
        ((7, 3, 3), (100, 3, 3), 10**9, (7, 3, 3)),
        ((0, 3, 3), (1, 3, 3), 10**9, (1, 3, 3)),
        ((3, 3), (3, 3), 1, (3, 3)),
    ],
)
def test_tiles(shape, unit, nbytes, tile):
    core = (0, 2) if shape == (4, 1000, 4) else None
    assert make_plan(layout(shape, unit, core), UNLIMITED, tile_nbytes=nbytes).tiling.tile == tile


@st.composite
def jobs(draw):
    batch = draw(st.lists(st.integers(1, 40), max_size=3))
    n = draw(st.integers(1, 6))
    shape = (*batch, n, n)
    unit = tuple(draw(st.integers(1, size + 3)) for size in shape)
    threads, scratch = draw(st.integers(1, 4)), draw(st.integers(0, 1000))
    memory = draw(st.one_of(st.none(), st.integers(2 * IDLE_WORKER_NBYTES, 3 * IDLE_WORKER_NBYTES)))
    return layout(shape, unit), Limits(memory, threads, scratch, 10), draw(st.integers(1, 10**6))


@given(jobs())
def test_every_matrix_is_in_exactly_one_tile_and_the_plan_fits(job):
    layout, limits, nbytes = job
    plan = make_plan(layout, limits, tile_nbytes=nbytes)
    tiling = plan.tiling
    seen = np.zeros(layout.shape[:-2], int)
    for number in range(tiling.n_tiles):
        region = tiling.region(number)
        assert all(span.stop > span.start for span in region)
        assert all(span.start % size == 0 for span, size in zip(region, tiling.tile, strict=False))
        seen[region] += 1
        assert tiling.region(number, "matrix")[:-2] == region
    assert (seen == 1).all()
    assert tiling.n_matrices == seen.size
    assert tiling.tile[-2:] == layout.shape[-2:]
    if limits.memory is not None:
        assert plan.projected_nbytes <= USABLE * limits.memory
    one_unit = math.prod(min(a, b) for a, b in zip(layout.shape[:-2], layout.read_unit, strict=False)) * layout.n**2 * 8
    assert math.prod(tiling.tile) * 8 <= max(LARGEST_TILE * nbytes, one_unit, layout.n**2 * 8)
    assert plan == make_plan(layout, limits, tile_nbytes=nbytes)


def test_memory_makes_tiles_smaller():
    big = layout((10**6, 10, 10), (1000, 10, 10))
    free = make_plan(big, UNLIMITED, tile_nbytes=64 * MIB)
    tight = make_plan(big, Limits(300 * MIB, 1, 0, 10), tile_nbytes=64 * MIB)
    assert math.prod(tight.tiling.tile) < math.prod(free.tiling.tile)
    assert tight.projected_nbytes <= 0.8 * 300 * MIB
    assert tight.tiling.tile[0] % 1000 == 0 or 1000 % tight.tiling.tile[0] == 0


def test_more_threads_need_more_memory():
    one = layout((10**6, 10, 10), (1000, 10, 10))
    tile = (1000, 10, 10)
    need = [project_memory(one, Limits(None, threads, MIB, 10), tile) for threads in (1, 2, 3)]
    assert need[2] - need[1] == need[1] - need[0] > 0


def test_reading_whole_shards_needs_more_memory():
    some = layout((1000, 10, 10), (10, 10, 10), itemsize_out=4, needs_copy=True)
    tile = (1000, 10, 10)
    assert project_memory(some, Limits(None, 1, 0, None), tile) > project_memory(some, Limits(None, 1, 0, 10), tile)


def test_what_cannot_fit_is_refused_with_the_numbers_and_the_knob():
    huge = layout((10, 20000, 20000), (1, 20000, 20000))
    with pytest.raises(PlanError, match=r"12.11 GiB are needed.*819.20 MiB of the 1.00 GiB.*`memory_limit=`") as caught:
        make_plan(huge, Limits(2**30, 1, 0, 10), tile_nbytes=32 * MIB)
    assert isinstance(caught.value, MemoryError)
    # The advice is good.
    advised = int(caught.value.args[0].rpartition("`memory_limit=` to ")[2].split(".")[0]) + 1
    make_plan(huge, Limits(advised * 2**30, 1, 0, 10), tile_nbytes=32 * MIB)


def test_a_tile_already_begun_stays_or_is_refused():
    some = layout((1000, 100, 100), (10, 100, 100))
    begun = make_plan(some, Limits(2**30, 1, 0, 10), tile_nbytes=MIB, tile=(500, 100, 100))
    assert begun.tiling.tile == (500, 100, 100)
    with pytest.raises(PlanError):
        make_plan(some, Limits(256 * MIB, 1, 0, 10), tile_nbytes=MIB, tile=(500, 100, 100))


def test_reads_counts_how_often_a_chunk_is_decoded():
    some = layout((1000, 4, 4), (100, 4, 4))
    for tile, times in (((100, 4, 4), 1), ((50, 4, 4), 2), ((25, 4, 4), 4), ((200, 4, 4), 1), ((150, 4, 4), 1.3)):
        assert make_plan(some, UNLIMITED, tile_nbytes=1, tile=tile).read_amplification == pytest.approx(times)


def test_plans_speak_to_people_and_machines():
    plan = make_plan(layout((1000, 4, 4), (100, 4, 4)), Limits(2**30, 2, 0, 10), tile_nbytes=1)
    text, facts = str(plan), plan.to_json()
    assert "1,000 of 4 x 4" in text
    assert "1.00 GiB allowed, 2 threads" in text
    assert "decoded" in text
    assert facts["matrices"] == 1000
    assert facts["projected_bytes_per_worker"] == plan.projected_nbytes


# --- very many tiles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "unit", "nbytes", "tile"),
    [
        ((10**15, 4, 4), (1, 4, 4), 128, None),
        ((10**15, 4, 4), (7, 4, 4), 1000, None),
        ((2**40, 2**19, 2, 2), (1, 1, 2, 2), MIB, None),
        ((10**17, 0, 0), (10**17, 1, 1), MIB, None),
        ((2**61 - 1, 1, 1), (2**61 - 1, 1, 1), MIB, None),  # a prime
        ((10**15, 4, 4), (1000, 4, 4), MIB, (1, 4, 4)),
        ((10_000_001, 4, 4), (1, 4, 4), MIB, (1, 4, 4)),
    ],
)
def test_very_many_tiles_are_refused_at_once(shape, unit, nbytes, tile):
    match = r"has [\d,]{10,} tiles of shape .* may have 10,000,000: .*`tile_size=`"
    with pytest.raises(PlanError, match=match) as caught:
        make_plan(layout(shape, unit), UNLIMITED, tile_nbytes=nbytes, tile=tile)
    assert ("another target" in str(caught.value)) == (tile is not None)


def test_memory_that_makes_very_many_tiles():
    limits = Limits(IDLE_WORKER_NBYTES * 5 // 4 + 5 * MIB, 1, 0, 10)
    with pytest.raises(PlanError, match=r"has [\d,]+ tiles of shape .*more memory"):
        make_plan(layout((10**14, 8, 8), (1000, 8, 8)), limits, tile_nbytes=64 * MIB)


def test_many_tiles_that_are_not_too_many():
    plan = make_plan(layout((10**7 * 32, 4, 4), (3, 4, 4)), UNLIMITED, tile_nbytes=MIB, tile=(32, 4, 4))
    assert plan.tiling.n_tiles == 10**7
    assert plan.read_amplification == pytest.approx(1 + (10**7 - 3333334) / 106666667)


@given(st.integers(1, 200), st.integers(1, 30), st.integers(1, 30))
def test_reads_are_those_that_can_be_counted(size, unit, step):
    some = layout((size, 1, 1), (unit, 1, 1))
    units = [set(range(start // unit, -(-min(start + step, size) // unit))) for start in range(0, size, step)]
    times = sum(map(len, units)) / len(set().union(*units))
    assert make_plan(some, UNLIMITED, tile_nbytes=1, tile=(step, 1, 1)).read_amplification == pytest.approx(times)


@given(st.integers(2, 3000))
def test_a_read_unit_is_cut_into_equal_parts_where_it_can(size):
    found = make_plan(layout((size, 1, 1), (size, 1, 1)), UNLIMITED, tile_nbytes=size + 1).tiling.tile[0]
    assert found <= size // 2
    equal = [part for part in range(size // 4, size // 2 + 1) if part and size % part == 0]
    assert found == max(equal, default=size // 2)


def test_where_chunks_are_decoded_several_times_it_is_said_how_to_avoid_that():
    # A chunk of 98 MiB that must be decoded whole.
    cut = layout((4000, 4000, 4, 4), (1000, 800, 4, 4))
    plan = make_plan(cut, UNLIMITED, tile_nbytes=2**20)
    assert plan.read_amplification > 30
    assert plan.advice == "chunks of the source are cut by tiles: `tile_size='98MiB'` avoids that"
    assert plan.advice in str(plan)
    assert make_plan(cut, UNLIMITED, tile_nbytes=98 * 2**20).advice is None
    limited = make_plan(cut, Limits(memory=740 * 2**20, threads=1, scratch=0, read_concurrency=10), tile_nbytes=2**20)
    assert " and `memory_limit='" in limited.advice
    # Not so where parts of chunks can be read.
    rows = layout((4000, 10, 4, 4), (1000, 10, 4, 4), direct_nbytes=0, in_part=True)
    assert make_plan(rows, UNLIMITED, tile_nbytes=2**17).read_amplification == 1
    wished = layout((4000, 4, 4), (1000, 4, 4), fixed={0: 300})
    assert "choose multiples" in make_plan(wished, UNLIMITED, tile_nbytes=2**17).advice
    inside = layout((4000, 4, 4), (1000, 4, 4), start=(10, 0, 0))
    assert "select from where one begins" in make_plan(inside, UNLIMITED, tile_nbytes=2**17).advice

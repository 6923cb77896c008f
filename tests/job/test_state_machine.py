"""A target against a model of it: begun, interrupted, damaged, verified, finished, replaced, in any order."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from dask_batchinv import TargetError, inverse_ex, invert_store, verify_store
from dask_batchinv.job.report.account import account_of
from dask_batchinv.job.target.lock import LOCK
from tests.support.targets import spoilt

TILES, PER_TILE, N = 6, 10, 3
PARTS = ("inverse/c.{}.0.0", "info/c.{}", "rcond/c.{}")


class Target(RuleBasedStateMachine):
    """The model: which tiles are recorded, which of them are damaged, and of which job."""

    client: Client

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.source, self.target = self.folder / "source", self.folder / "target"
        self.a = np.asarray(spoilt(TILES * PER_TILE, N)[0])
        self.a = np.triu(self.a)  # so that two words give two results
        array = zarr.create_array(self.source, shape=self.a.shape, chunks=(PER_TILE, N, N), dtype=float)
        array[...] = self.a
        self.expected = {word: inverse_ex(self.a, assume_a=word) for word in ("general", "upper triangular")}
        self.word = "general"
        self.recorded: set[int] = set()
        self.damaged: set[int] = set()
        self.known: set[int] = set()
        """Tiles that a run has finished with, and none has to read back while nobody touches them."""
        self.stale: set[int] = set()
        """Tiles that were recorded when their source was written to."""
        self.exists = self.complete = False

    def teardown(self):
        shutil.rmtree(self.folder)

    def run(self, **options):
        # Tiles of 720 bytes, one at a time.
        return invert_store(
            self.source, self.target, client=self.client, tile_size=720, max_failed=None, assume_a=self.word, **options
        )

    def after(self):
        self.recorded = self.known = set(range(TILES))
        self.damaged, self.stale = set(), set()
        self.exists = self.complete = True

    @rule()
    def finish(self):
        healthy = len(self.recorded - self.damaged - self.stale)
        report = self.run()
        assert report.exit_code == 0
        assert {bad.number for bad in report.damaged_tiles} == self.damaged
        assert report.tiles_proven == len(self.recorded - self.damaged - self.known)
        assert report.changed_tiles == len(self.stale - self.damaged)
        assert report.tiles_now == TILES - healthy
        self.after()

    @rule(after=st.integers(0, TILES - 1))
    def crash(self, after):
        """Stop where at least so many tiles are recorded, or before anything is."""
        healthy = self.recorded - self.damaged - self.stale

        def stop(progress):
            if progress.activity == "inverting" and progress.matrices_done >= after * PER_TILE:
                raise KeyboardInterrupt

        try:
            self.run(on_progress=stop)
        except KeyboardInterrupt:
            found = account_of(self.target)
            assert found.tiles_done >= len(healthy)
            assert not found.complete
            rows = zarr.open_array(self.target / "ledger" / "tiles")[:, 0]
            self.recorded, self.damaged = set(np.flatnonzero(rows).tolist()), set()
            assert healthy <= self.recorded
            self.known, self.stale = self.known & healthy, set()
            self.exists, self.complete = True, False
        else:  # there was nothing to interrupt
            assert healthy == set(range(TILES))
            self.after()

    @precondition(lambda self: self.recorded)
    @rule(data=st.data(), part=st.sampled_from(PARTS), how=st.sampled_from(["flip", "cut", "remove"]))
    def corrupt(self, data, part, how):
        number = data.draw(st.sampled_from(sorted(self.recorded)))
        path = self.target / part.format(number)
        if number in self.damaged or not path.exists():
            return
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        if how == "remove":
            path.unlink()
        else:
            path.write_bytes(content if how == "flip" else content[:-1])
        self.damaged.add(number)

    @precondition(lambda self: self.exists)
    @rule()
    def lose_the_ledger(self):
        for path in (self.target / "ledger" / "tiles" / "c").rglob("*"):
            if path.is_file():
                path.unlink()
        self.recorded, self.damaged, self.known, self.stale = set(), set(), set(), set()

    @rule(number=st.integers(0, TILES - 1), seed=st.integers(0, 2**32 - 1))
    def write_to_the_source(self, number, seed):
        part = slice(number * PER_TILE, (number + 1) * PER_TILE)
        self.a[part] = np.triu(np.random.default_rng(seed).normal(size=(PER_TILE, N, N)))
        zarr.open_array(self.source)[part] = self.a[part]
        self.expected = {word: inverse_ex(self.a, assume_a=word) for word in self.expected}
        self.stale |= {number} & self.recorded

    @precondition(lambda self: self.exists)
    @rule()
    def leave_a_lock(self):
        (self.target / LOCK).write_text("process 1 on nowhere")

    @precondition(lambda self: self.exists and not self.stale)
    @rule()
    def verify(self):
        report = verify_store(self.target, source=self.source, client=self.client)
        unrecorded = set(range(TILES)) - self.recorded
        assert {bad.number for bad in report.bad_tiles} == self.damaged | unrecorded
        assert report.ok == (self.complete and not self.damaged and not unrecorded)

    @precondition(lambda self: self.exists)
    @rule()
    def another_job(self):
        """Another job is refused, and with overwrite it replaces this one."""
        before, self.word = self.word, next(word for word in self.expected if word != self.word)
        try:
            self.run()
        except TargetError as error:
            assert f"assume_a was {before!r}" in str(error)  # noqa: PT017 - not where nothing is raised
        else:
            raise AssertionError("another job was not refused")
        assert self.run(overwrite=True).exit_code == 0
        self.after()

    @invariant()
    def what_is_recorded_and_whole_is_right(self):
        if not self.exists:
            return
        expected = self.expected[self.word]
        for number in self.recorded - self.damaged - self.stale:
            part = slice(number * PER_TILE, (number + 1) * PER_TILE)
            for name in ("inverse", "info", "rcond"):
                got = zarr.open_array(self.target / name, mode="r")[part]
                np.testing.assert_array_equal(got, getattr(expected, name)[part])


def run_machine(examples, steps):
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        Target.client = client
        run_state_machine_as_test(
            Target, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
        )


def test_a_target_behaves_as_its_model():
    run_machine(6, 8)


@pytest.mark.slow
def test_a_target_behaves_as_its_model_for_long():
    run_machine(300, 30)

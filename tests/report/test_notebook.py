"""What notebooks show, and what they do when somebody stops a cell."""

import io
import sys
import threading
import time

import dask.array as da
import numpy as np
import pytest
import zarr

import dask_batchinv
from dask_batchinv import InterruptedJob, inverse_ex, invert_store, plan_store, report_store, status, verify_store
from dask_batchinv.job.report import display
from dask_batchinv.job.report.interrupted import INTERRUPTED_CALL
from dask_batchinv.job.report.run_record import Progress
from tests.support.stacks import conditioned


@pytest.fixture
def source(tmp_path):
    a = conditioned(200, 3, 10)
    a[7] = 0
    zarr.create_array(tmp_path / "<s>", shape=a.shape, dtype=a.dtype, chunks=(10, 3, 3))[...] = a
    return tmp_path / "<s>"


def test_everything_shows_itself(source, tmp_path):
    target = tmp_path / "t"
    plan = plan_store(source, target, tile_size=720)
    assert not target.exists()
    report = invert_store(source, target, tile_size=720, max_failed=1)
    for thing, words in (
        (plan, "memory per worker"),
        (report, "1 singular: (7,)"),
        (status(target), "up to date"),
        (verify_store(target, workers=1), "checksums right"),
        (report_store(target), "[7]: singular (pivot 1 is exactly zero)"),
    ):
        shown = thing._repr_html_()
        assert words in shown, thing
        assert "<s>" not in shown
        assert "&lt;s&gt;" in shown or thing is plan or "verified" in shown
        assert shown.count("<tr>") == shown.count("</tr>") > 2
        # The same facts as on a terminal.
        assert words in str(thing)


def test_a_plan_is_that_of_the_job(source, tmp_path):
    plan = plan_store(source, tmp_path / "t", tile_size=7200, assume_a="sym")
    report = invert_store(source, tmp_path / "t", tile_size=7200, assume_a="sym", max_failed=1)
    assert plan.tiling.n_tiles == report.tiles
    with pytest.raises(TypeError, match="unknown_option"):
        plan_store(source, tmp_path / "t", unknown_option=1)
    with pytest.raises(dask_batchinv.TargetError, match="another job"):
        plan_store(source, tmp_path / "t", assume_a="diagonal")


def test_an_account_shows_itself():
    a = conditioned(5, 3, 10)
    a[1], a[2, 0, 0] = 0, np.nan
    shown = inverse_ex(a)._repr_html_()
    assert "5; without an inverse: 1 singular, 1 with NaN or infinity" in shown
    assert "(5, 3, 3), float64" in shown
    lazy = inverse_ex(da.from_array(a, chunks=(2, 3, 3)), logdet=True)._repr_html_()
    assert "dask.Array (5, 3, 3)" in lazy  # and nothing is computed for that
    assert "logdet" in lazy
    assert "without an inverse" not in lazy


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("enabled", "terminal", "notebook", "shows"),
    [
        (None, False, False, False),
        (None, True, False, True),
        (None, False, True, True),
        (True, False, False, True),
        (False, True, True, False),
    ],
)
def test_progress_is_shown_where_somebody_looks(monkeypatch, enabled, terminal, notebook, shows):
    monkeypatch.setattr(display, "_is_in_notebook", lambda: notebook)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr(display.importlib.util, "find_spec", lambda name: None)
    stream = Terminal() if terminal else io.StringIO()
    with display.shown(enabled=enabled, stream=stream) as tell:
        if tell is not None:
            tell(Progress("inverting", 100, 40, 0, 3, 1, 2.0))
    assert ("3 without an inverse, 1 tile failed" in stream.getvalue()) == shows


def test_a_job_shows_its_progress_if_asked_to(source, tmp_path, capfd):
    invert_store(source, tmp_path / "t", max_failed=1)
    assert capfd.readouterr().err == ""
    invert_store(source, tmp_path / "u", max_failed=1, progress=True)
    assert "200 of 200 matrices (100%)" in capfd.readouterr().err


def test_a_cell_that_was_interrupted_goes_on_when_it_is_run_again(source, tmp_path):
    def stop(progress):
        if progress.matrices_done:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedJob, match="make the same call again for the rest"):
        invert_store(source, tmp_path / "t", tile_size=720, on_progress=stop, max_failed=1)
    report = invert_store(source, tmp_path / "t", tile_size=720, max_failed=1)
    assert report.complete
    assert report.tiles_now < report.tiles


def test_ipython_says_it_in_one_line(source, tmp_path, capsys):
    shell_module = pytest.importorskip("IPython.core.interactiveshell", reason="IPython is not installed")
    shell = shell_module.InteractiveShell.instance()
    shell.user_ns |= {"source": str(source), "target": str(tmp_path / "t")}
    shell.run_cell(
        "import dask_batchinv\n"
        "def stop(progress):\n"
        "    if progress.matrices_done: raise KeyboardInterrupt\n"
        "dask_batchinv.invert_store(source, target, tile_size=720, on_progress=stop)"
    )
    told = capsys.readouterr()
    assert (told.out + told.err).strip() == str(InterruptedJob(INTERRUPTED_CALL))


def test_status_follows_a_run(source, tmp_path):
    """From another thread, as from another terminal: the numbers are those of the run."""
    from click.testing import CliRunner

    from dask_batchinv.cli import main

    begun, seen = threading.Event(), []

    def slow(progress):
        seen.append(progress.matrices_done)
        begun.set()
        time.sleep(0.05)

    work = threading.Thread(
        target=invert_store,
        args=(source, tmp_path / "t"),
        kwargs={"tile_size": 720, "on_progress": slow, "max_failed": 1},
    )
    work.start()
    begun.wait(30)
    time.sleep(0.3)
    ran = CliRunner().invoke(main, ["status", str(tmp_path / "t"), "--follow"])
    work.join()
    assert ran.exit_code == 0, ran.output
    assert "of 200 matrices" in ran.stderr
    assert "without an inverse" in ran.stderr
    assert "state            complete" in ran.stdout

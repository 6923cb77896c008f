"""The report of a target: complete or not, damaged or not, for people, machines and browsers."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner

from dask_batchinv import JobFailedError, RefusedError, TargetError, invert_store, report_store
from dask_batchinv.cli import main
from tests.support.stacks import conditioned

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def stored(folder):
    """Store a stack with failures, labels and a mask; return it."""
    a = conditioned(40 * 30, 3, 100).reshape(40, 30, 3, 3)
    a[7, 5], a[30, 20, 0, 0] = 0, np.nan
    mask = np.zeros((40, 30), bool)
    mask[:, 28:] = True
    dataset = xr.Dataset(
        {"a": (("y", "x", "i", "j"), a), "mask": (("y", "x"), mask)},
        {"y": np.linspace(50, 40, 40), "x": np.arange(30) * 10, "day": ("y", np.arange(40).astype("M8[D]"))},
    )
    dataset.chunk(y=10, x=10).to_zarr(folder / "s", consolidated=False)
    return a, dataset


@pytest.fixture
def target(tmp_path):
    stored(tmp_path)
    report = invert_store(tmp_path / "s", tmp_path / "t", variable="a", max_failed=None, tile_size=8000)
    assert report.n_failed == 2
    return tmp_path / "t"


class _Page(HTMLParser):
    """What a page would ask others for, its open tags, and its text."""

    def __init__(self, text):
        super().__init__()
        self.asked, self.open, self.text, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "link", "path", "use", "image", "rect", "line", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset") and not value.startswith(
                ("#", "data:")
            ):
                self.asked.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone_and_tells_all(target):
    report = report_store(target)
    page = report.to_html()
    found = _Page(page)
    assert found.asked == []
    assert found.open == []
    assert "script" not in found.tags
    assert found.tags.count("svg") == 4  # two maps, a histogram, the throughput
    assert "@import" not in page
    assert "mathdefault" not in page
    assert not re.search(r"url\((?!#)", page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    text = " ".join(found.text)
    for words in ("complete", "singular (pivot 1 is exactly zero)", "7, 5", "30, 20", "1970-01-08", "200"):
        assert words in text, words
    # Of the dimensions first, and such that they are found by them.
    assert list(report.failed[0].coordinates) == ["y", "x", "day"]
    assert report.failed[0].coordinates["day"] == "1970-01-08"
    opened = xr.open_zarr(target, consolidated=False)
    for matrix in report.failed:
        place = {dim: matrix.coordinates[dim] for dim in ("y", "x")}
        assert int(opened["info"].sel(place)) == int(opened["info"][matrix.index])


def test_json_has_the_same(target):
    found = json.loads(json.dumps(report_store(target).to_json()))
    assert found["account"]["failed"]["singular"] == 1
    assert found["failed"][0]["index"] == [7, 5]
    assert found["map"]["kinds"][7][5] == "singular"
    assert found["map"]["log_rcond"][7][5] is None
    assert sum(found["histogram"]["counts"]) == found["histogram"]["matrices"] == 1198
    assert found["asked"]["assume_a"] == "general"
    assert found["runs"][-1]["versions"]["zarr"] == zarr.__version__
    assert found["runs"][-1]["timeline"][-1][1] == 1200


def test_of_an_unfinished_target(tmp_path):
    stored(tmp_path)
    group = zarr.open_group(tmp_path / "s", mode="a")
    shutil.rmtree(tmp_path / "s" / "a" / "c" / "3")
    assert group["a"].shape[0] == 40
    with pytest.raises(JobFailedError):
        invert_store(tmp_path / "s", tmp_path / "t", variable="a", max_failed=None, tile_size=8000)
    report = report_store(tmp_path / "t")
    assert not report.account.complete
    assert report.account.matrices_done == 900
    assert "pending" in {kind for row in report.map.to_json()["kinds"] for kind in row}
    assert "not complete" in report.to_html()
    assert report.histogram.matrices == 899


def test_arrays_of_other_names_and_no_labels(tmp_path):
    a = conditioned(50, 3, 10)
    a[4] = 0
    zarr.create_array(tmp_path / "s", shape=a.shape, dtype=a.dtype, chunks=(10, 3, 3))[...] = a
    done = invert_store(tmp_path / "s", tmp_path / "t", max_failed=None, names={"info": "flag", "rcond": "quality"})
    assert done.first_failed["singular"] == [(4,)]
    report = report_store(tmp_path / "t")
    assert [(each.index, each.coordinates) for each in report.failed] == [((4,), {})]
    assert report.notes == ()
    assert report.histogram.matrices == 49


def test_one_matrix(tmp_path):
    zarr.create_array(tmp_path / "s", shape=(2, 2), dtype=float)[...] = np.eye(2)
    invert_store(tmp_path / "s", tmp_path / "t")
    report = report_store(tmp_path / "t")
    assert report.map is None
    assert _Page(report.to_html()).tags.count("svg") >= 1


def test_what_is_damaged_is_said_and_the_rest_is_told(target):
    chunk = target / "rcond" / "c.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    report = report_store(target)
    assert any("rcond cannot be read" in note for note in report.notes)
    assert report.account.failed["singular"] == 1
    assert report.map.by_tile
    assert "cannot be read" in report.to_html()


def test_names_from_stores_are_text_in_a_page(tmp_path):
    a = conditioned(4, 2, 10)
    a[1] = 0
    name = '<script>alert("x")</script>'
    labels = {"k": ("k", np.array(["<b>", "<img src=x>", "c", "d"]))}
    dataset = xr.Dataset({name: (("k", "i", "j"), a)}, labels)
    dataset.to_zarr(tmp_path / "s", consolidated=False, zarr_format=2)
    invert_store(tmp_path / "s", tmp_path / "t", variable=name, max_failed=None)
    page = report_store(tmp_path / "t").to_html()
    assert not {"script", "img", "b"} & {*_Page(page).tags}
    assert "&lt;img src=x&gt;" in page


def test_the_command(target, tmp_path):
    ran = CliRunner().invoke(main, ["report", str(target), "-o", str(tmp_path / "r.html")])
    assert ran.exit_code == 0, ran.output
    assert "<svg" in (tmp_path / "r.html").read_text()
    told = CliRunner().invoke(main, ["report", str(target), "--json"])
    assert json.loads(told.stdout)["account"]["matrices"] == 1200
    assert "[7, 5]" in CliRunner().invoke(main, ["report", str(target)]).stdout
    refused = CliRunner().invoke(main, ["report", str(target), "-o", str(tmp_path / "none" / "r.html")])
    assert refused.exit_code == 2
    assert "cannot be written" in refused.output
    assert CliRunner().invoke(main, ["report", str(tmp_path / "s")]).exit_code == 2


def test_run_with_a_report(tmp_path):
    stored(tmp_path)
    arguments = ["run", str(tmp_path / "s"), str(tmp_path / "t"), "--variable", "a"]
    # Refused before anything is written.
    refused = CliRunner().invoke(main, [*arguments, "--report", str(tmp_path / "none" / "r.html")])
    assert refused.exit_code == 2
    assert not (tmp_path / "t").exists()
    ran = CliRunner().invoke(main, [*arguments, "--report", str(tmp_path / "r.html")])
    assert ran.exit_code == 3  # two matrices failed, and the report says which
    assert "30, 20" in (tmp_path / "r.html").read_text()


def test_without_matplotlib(target, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(RefusedError, match="pip install matplotlib"):
        report_store(target).to_html()
    assert report_store(target).to_json()["account"]["complete"]


def test_the_report_of_a_job(tmp_path):
    stored(tmp_path)
    report = invert_store(tmp_path / "s", tmp_path / "t", variable="a", max_failed=None)
    report.to_html(tmp_path / "r.html")
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_there_must_be_a_target(tmp_path):
    with pytest.raises(TargetError):
        report_store(tmp_path)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1300])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_in_a_browser(target, tmp_path, width, theme):
    """It renders as wide as the window, in its colours, and the browser complains of nothing."""
    page = report_store(target).to_html()
    # What is measured goes to the title, for a dumped page shows that.
    probe = (
        "<script>addEventListener('load', () => { const b = document.body; document.title = JSON.stringify("
        "{wide: document.documentElement.scrollWidth, window: innerWidth, paper: getComputedStyle(b).backgroundColor,"
        " ink: getComputedStyle(b).color, pictures: [...document.querySelectorAll('svg')].map(s => s.clientWidth),"
        " text: getComputedStyle(document.querySelector('svg text')).fill}); });</script>"
    )
    (tmp_path / "r.html").write_text(page.replace("</head>", f"{probe}</head>"))
    colours = [] if theme == "light" else ["--blink-settings=preferredColorScheme=0"]
    # Chromium makes no window narrower than 500 pixels: a narrow one is a frame in a wider one.
    frame = f'<iframe src="r.html" style="width:{width}px;height:2000px" onload="'
    frame += 'setTimeout(() => document.title = this.contentDocument.title, 300)"></iframe>'
    (tmp_path / "frame.html").write_text(frame)
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000",
        "--window-size=1400,2200", *colours, "--dump-dom", f"file://{tmp_path / 'frame.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ":CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert seen["wide"] <= seen["window"] <= width
    assert len(seen["pictures"]) == 4
    assert min(seen["pictures"]) > 250
    dark = sum(map(int, re.findall(r"\d+", seen["paper"])[:3])) < 200
    assert dark == (theme == "dark")
    assert seen["text"] == seen["ink"]  # pictures are written in the colour of the page


def test_pictures_are_pictures(target):
    """The embedded images have the colours of what happened."""
    page = report_store(target).to_html()
    images = re.findall(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)", page)
    assert len(images) >= 2
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)

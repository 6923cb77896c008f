"""Limits: a disk that fills up, memory that is no more than the plan says, a million tiles."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from tests.campaign.listing import served
from tests.campaign.processes import Client, cluster
from tests.campaign.work import Row, Work, check, recorded

PAGE = 4096


def full_disks(work: Work, folder: Path, times: int, _: random.Random) -> Iterator[Row]:
    """A file system of limited size fills up at some share of what the target needs; then it grows."""
    row = Row("the disk is full at 25, 50, 75, 99 % of the target")
    need = sum(-(-path.stat().st_size // PAGE) * PAGE for path in work.reference.rglob("*") if path.is_file())
    if os.geteuid() != 0:
        row.remarks["skipped"] = "mounting a tmpfs takes root"
        yield row
        return
    with cluster(folder) as running:
        for share in (0.25, 0.50, 0.75, 0.99) * times:
            with row.run(f"at {share:.0%}"), _small_disk(work.folder / "small", int(share * need)) as small:
                target = small / "target.zarr"
                command = work.command(target, "--scheduler", running.address)
                ended = Client(work.folder, command).wait()
                check(ended.code == 1, f"exit code {ended.code}, expected 1: {ended.err[-500:]}")
                check("No space left on device" in ended.out + ended.err, "the cause is not named")
                subprocess.run(["mount", "-o", f"remount,size={2 * need}", small], check=True)
                (small / "log").unlink(missing_ok=True)
                ended = Client(work.folder, command).wait()
                check(ended.code == 0, f"exit code {ended.code} after the disk has grown: {ended.err[-500:]}")
                work.check(target)
    yield row


@contextmanager
def _small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


#: n, dtype, chunk of the source, further options: what makes the projection large in its different terms.
MEMORY_CASES: tuple[tuple[int, str, int, dict[str, Any]], ...] = (
    (2, "f4", 2**18, {}),
    (7, "f8", 2**14, {}),
    (64, "f8", 1000, {}),
    (16, "c16", 2**13, {"compressors": "auto"}),
    (32, "i2", 4096, {}),
    (512, "f8", 16, {}),
)


def memory(folder: Path, times: int, _: random.Random) -> Iterator[Row]:
    """A worker in a control group that has no byte more than was projected."""
    row = Row("a worker has as much memory as was projected, and no more")
    group = Path("/sys/fs/cgroup/memory")
    if not os.access(group, os.W_OK):
        row.remarks["skipped"] = "takes a writable memory control group of version 1"
        yield row
        return
    worst = 0.0
    for n, dtype, chunk, options in MEMORY_CASES * times:
        with row.run(f"n = {n}, {dtype}"):
            worst = max(worst, _limited_run(folder, group / f"campaign-{os.getpid()}", n, dtype, chunk, options))
    row.remarks["largest share of the projection that was used"] = round(worst, 2)
    yield row


def _limited_run(folder: Path, group: Path, n: int, dtype: str, chunk: int, options: dict[str, Any]) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "memory-source.zarr", folder / "memory-target.zarr"
    for path in (source, target):
        subprocess.run(["rm", "-rf", path], check=True)
    rng = np.random.default_rng(n)
    array = zarr.create_array(source, shape=(4 * chunk, n, n), chunks=(chunk, n, n), dtype=dtype, **options)
    for start in range(0, 4 * chunk, chunk):
        array[start : start + chunk] = (100 * rng.normal(size=(chunk, n, n))).astype(dtype)
    arguments = [str(source), str(target), "--max-failed", "any"]
    cli = [sys.executable, "-m", "dask_batchinv.cli"]
    with cluster(folder / "cluster", workers=1, memory="16GiB") as running:
        where = ["--scheduler", running.address]
        planned = subprocess.run([*cli, "plan", *arguments, *where, "--json"], capture_output=True, check=True)
        projected = json.loads(planned.stdout)["projected_bytes_per_worker"]
        group.mkdir(exist_ok=True)
        try:
            (group / "memory.limit_in_bytes").write_text(str(projected))
            for worker in running.workers():
                (group / "cgroup.procs").write_text(str(worker.pid))
            ended = Client(folder, ["run", *arguments, *where, "--json", "--quiet"]).wait()
            check(ended.code == 0, f"exit code {ended.code}: {ended.out[-500:]} {ended.err[-500:]}")
            check(ended.report["retries"] == 0, "a worker died")
            (worker,) = running.workers()
            used = _peak_memory(worker.pid)
        finally:
            for worker in running.workers():
                worker.kill()
                worker.wait(10)
            time.sleep(0.1)
            with suppress(OSError):
                group.rmdir()
    return used / projected


def _write_chunks_of_four(path: Path, a: Any) -> None:
    """Write 2 x 2 matrices, four to a chunk, faster than Zarr can."""
    keys = {"name": "default", "separator": "."}
    array = zarr.create_array(
        path, shape=a.shape, chunks=(4, 2, 2), dtype="f8", compressors=None, chunk_key_encoding=keys
    )
    array[:4] = a[:4]
    check((path / "c.0.0.0").read_bytes() == a[:4].tobytes(), "chunks are stored in another way than was thought")
    for number in range(1, len(a) // 4):
        (path / f"c.{number}.0.0").write_bytes(a[4 * number : 4 * number + 4].tobytes())


def _stamps(target: Path) -> dict[str, int]:
    """When each chunk was written last."""
    found = {}
    for name in ("inverse", "info", "rcond"):
        with os.scandir(target / name) as entries:
            found |= {f"{name}/{entry.name}": entry.stat().st_mtime_ns for entry in entries if entry.name[:2] == "c."}
    return found


def a_million_tiles(folder: Path, tiles: int, chance: random.Random) -> Iterator[Row]:
    """Very many very small tiles: killed half way, finished, compared when nothing has changed, or one chunk."""
    row = Row(f"{tiles:,} tiles of four 2 x 2 matrices, everything killed half way")
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / "many-source.zarr", folder / "many-target.zarr"
    subprocess.run(["rm", "-rf", source, target], check=True)
    a = np.random.default_rng(0).normal(size=(4 * tiles, 2, 2))
    _write_chunks_of_four(source, a)
    arguments = [sys.executable, "-m", "dask_batchinv.cli", "run", str(source), str(target), "--tile-size", "32",
                 "--workers", "2", "--json", "--quiet"]  # fmt: skip
    with row.run("from the beginning to the end"):
        with subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL) as process:
            first = _watch(process, lambda: recorded(target) >= tiles // 2, every=10.0)
            os.killpg(process.pid, signal.SIGKILL)
        peaks, seconds, reports = [first], [], []
        for number in range(3):
            if number == 2:
                before = _stamps(target)
                zarr.open_array(source)[400:404] = a[400:404] = chance.random() + a[400:404]
            start = time.monotonic()
            with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                peaks.append(_watch(process, lambda: False))
                reports.append(json.loads(process.stdout.read()))
            seconds.append(time.monotonic() - start)
            check(process.returncode == 0, f"exit code {process.returncode}")
        check(reports[0]["tiles_now"] + reports[0]["tiles_proven"] == tiles, "tiles were lost")
        check(reports[0]["tiles_proven"] >= tiles // 2, "it was not killed half way")
        check(reports[1]["tiles_now"] == 0, "tiles were done again")
        check((reports[2]["changed_tiles"], reports[2]["tiles_now"]) == (1, 1), "not just one tile was done again")
        after = _stamps(target)
        changed = sorted(name for name in before if before[name] != after[name])
        check(changed == ["info/c.100", "inverse/c.100.0.0", "rcond/c.100"], f"more was written: {changed[:5]}")
        start = time.monotonic()
        checked = subprocess.run([*arguments[:-1], "--check"], stdout=subprocess.DEVNULL, check=False)
        checking = time.monotonic() - start
        check(checked.returncode == 0, f"the check ends with exit code {checked.returncode}")
        inverse = zarr.open_array(target / "inverse", mode="r")
        for start in chance.sample(range(0, len(a) - 4096, 4096), 20):
            part = inverse[start : start + 4096]
            residual = np.abs(part @ a[start : start + 4096] - np.eye(2)).max(axis=(1, 2))
            check((residual < 1e-13 * np.linalg.cond(a[start : start + 4096])).all(), "an inverse is wrong")
    row.remarks |= {
        "peak memory of client and scheduler, MiB": round(max(peaks) / 2**20),
        "seconds of the run that does the second half": round(seconds[0]),
        "seconds of a run where nothing has changed": round(seconds[1], 1),
        "seconds of a run where one chunk of the source has": round(seconds[2], 1),
        "seconds of `run --check`": round(checking, 1),
        **_ask_in_a_store(folder, source.name, target.name),
        "bytes of the ledger per tile": round(sum(p.stat().st_size for p in (target / "ledger").rglob("*")) / tiles, 1),
    }
    yield row


def _ask_in_a_store(folder: Path, source: str, target: str) -> dict[str, Any]:
    """Count what `status` asks an object store for that has the same keys."""
    try:
        import s3fs  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        return {"requests of `status` in an object store": "s3fs is not installed"}
    with served(folder, without=("inverse", "info", "rcond")) as (url, counts):
        base = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
        settings = {"FSSPEC_S3_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
        start = time.monotonic()
        command = [sys.executable, "-m", "dask_batchinv.cli", "status", f"s3://bucket/{target}", "--source",
                   f"s3://bucket/{source}", "--json"]  # fmt: skip
        ended = subprocess.run(command, env=base | settings, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - start
    # The ledger has the times of files, which are no ETags: so all tiles are found to differ.
    check(ended.returncode == 4, f"exit code {ended.returncode}: {ended.stdout[-500:]} {ended.stderr[-500:]}")
    return {
        "requests of `status` in an object store": counts.total(),
        "seconds of `status` in an object store on this machine": round(seconds, 1),
    }


def _watch(process: subprocess.Popen[Any], enough: Any, every: float = 0.5) -> int:
    """Wait for the end of a process, or until it is enough; return the peak of its memory."""
    peak = 0
    while process.poll() is None and not enough():
        peak = max(peak, _peak_memory(process.pid))
        time.sleep(every)
    return peak


def _peak_memory(pid: int) -> int:
    """Return the most that a process has had in memory, in bytes; 0 if it is just ending."""
    with suppress(OSError):
        found = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return 1024 * sum(map(int, found))
    return 0

"""Times whole jobs against a bare loop and against what others would write, and writes a page about it.

python -m tests.benchmarks.pipeline --out docs/benchmarks
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks.cpu import processor
from tests.benchmarks.pipeline import measure, page
from tests.benchmarks.pipeline.files import ways_to_touch_files

VERSIONS = ("dask_batchinv", "numpy", "zarr", "dask", "distributed", "cubed", "tensorstore", "zarrs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for pipeline.md, pipeline.json and pipeline.png"
    )
    parser.add_argument("--in", dest="folder", type=Path, default=Path("/dev/shm"), help="where stores are; a tmpfs")
    parser.add_argument("--disk", type=Path, default=Path("."), help="a folder on a disk")
    parser.add_argument("--nbytes", type=int, default=2**31, help="bytes of each stack")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the page, the others stay as they are")
    options = parser.parse_args()
    path = options.out / "pipeline.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result["machine"] = {
        "processor": processor(), "system": platform.platform(), "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in VERSIONS},
    }  # fmt: skip
    result["repeat"] = options.repeat
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        parts = {
            "steps": lambda: measure.steps(folder, 7 * options.repeat),
            "files": lambda: ways_to_touch_files(
                {"in memory": folder / "files", "on a disk": options.disk / f"files-{folder.name}"}, 2 * options.repeat
            ),
            "small_jobs": lambda: measure.small_jobs(options.repeat),
            "waiting": lambda: measure.waiting(folder, options.nbytes),
            "passes": lambda: measure.all_passes(folder, options.nbytes, options.repeat),
            "small_tiles": lambda: measure.small_tiles(folder, [10**3, 10**4, 10**5, 10**6]),
            "workers": lambda: measure.more_workers(folder, options.nbytes, options.repeat),
        }
        options.out.mkdir(parents=True, exist_ok=True)
        for part in options.only or parts:
            result[part] = parts[part]()
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(part, "done", flush=True)
    page.write(options.out)


if __name__ == "__main__":
    main()

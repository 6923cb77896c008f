"""The first minutes on a card: is every layout right, and how fast is it beside a copy?

    python -m tests.benchmarks.gpu_first --json first.json
    compute-sanitizer --tool racecheck python -m tests.benchmarks.gpu_first --bytes 3e5 --sizes 4 16 40

Of every size and dtype a stack is inverted with a singular matrix in its middle: some inverses are tested, and all of
`info`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dask_batchinv.kernels.cuda import kernels as cuda
from dask_batchinv.kernels.cuda import launch
from dask_batchinv.kernels.device import why_unusable
from tests.benchmarks.cases import DTYPES, KINDS, Case
from tests.benchmarks.gpu import make_on_gpu, time_in_turns
from tests.support.running import LIMIT, ratios_of_sides

SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 33, 48, 64, 96, 128, 256)


def look(case: Case, nbytes: int) -> dict[str, Any]:
    """Return whether the kernel of a case is right, and its times."""
    import cupy

    a = make_on_gpu(case, nbytes)
    m = len(a)
    a[m // 2] = 0
    out, info, rcond = cupy.empty_like(a), cupy.empty(m, np.int32), cupy.empty(m, a.real.dtype)
    out.fill(np.nan)
    info.fill(-99)
    cuda.run(a, out, info, rcond, assume_a=case.kind)
    codes = cupy.asnumpy(cupy.flatnonzero(info))
    some = np.setdiff1d(np.r_[0:16, m // 2 - 8 : m // 2, m - 16 : m].clip(0, m - 1), [m // 2])
    ratio = float(np.min(ratios_of_sides(cupy.asnumpy(a[some]), cupy.asnumpy(out[some])), axis=0).max())
    right = ratio <= LIMIT and list(codes) == [m // 2] and int(info[m // 2]) == 1
    seconds = time_in_turns(
        {"ours": lambda: cuda.run(a, out, info, rcond, assume_a=case.kind), "copy": lambda: cupy.copyto(out, a)},
        necessary=("ours", "copy"),
    )
    return {
        "layout": launch.choose_launch(case.n, case.dtype, case.kind).layout,
        "right": right,
        "ratio": ratio,
        "ns": 1e9 * seconds["ours"] / m,
        "share": seconds["copy"] / seconds["ours"],
        "copy_TBps": 2 * a.nbytes / seconds["copy"] / 1e12,
    }


def main() -> int:
    """Look at all; return 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=5e8, help="of a stack (default: %(default)g)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--kinds", nargs="+", default=["general"], choices=KINDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write what was found")
    options = parser.parse_args()
    if reason := why_unusable():
        parser.exit(2, f"there is nothing to look at: {reason}\n")
    import cupy

    found: dict[str, Any] = {}
    for kind in options.kinds:
        for dtype in options.dtypes:
            for n in options.sizes:
                case = Case(kind, n, dtype)
                try:
                    found[str(case)] = look(case, int(options.bytes))
                except Exception as error:  # the next may still work
                    found[str(case)] = {"right": False, "error": f"{type(error).__name__}: {error}"[:200]}
                print(case, json.dumps(found[str(case)]), flush=True)
                cupy.get_default_memory_pool().free_all_blocks()
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(not all(one["right"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())

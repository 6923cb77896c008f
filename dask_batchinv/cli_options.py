"""The options of the commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import click

from dask_batchinv.job.form import Packed
from dask_batchinv.job.options import BadChunks, Missing
from dask_batchinv.job.outputs import Keep
from dask_batchinv.stack import KEPT, SHORT_WORDS, AssumeA, Device, Precision


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


source_options, target_options = (
    click.option(f"--{name}-options", metavar="OPTIONS",
                 help=f"What the file system of {name.upper()} is given, such as credentials or an endpoint: a JSON "
                      "object, or, not to be seen by others on this machine, its name in the Dask configuration.")
    for name in ("source", "target")
)  # fmt: skip

job_options = _options(
    click.argument("source"),
    click.argument("target"),
    source_options,
    target_options,
    click.option("--variable", metavar="NAME", help="The stack in a group (Xarray dataset) that has several arrays."),
    click.option("--dims", metavar="ROW,COL",
                 help="Names of the core dimensions. Default: the last two, where no others could be meant."),
    click.option("--packed", type=click.Choice(get_args(Packed)),
                 help="The last dimension, or --dims NAME, has a triangle of each matrix: n(n+1)/2 numbers."),
    click.option("--complex-dim", metavar="NAME", help="The dimension of length 2 with real and imaginary parts."),
    click.option("--imag", metavar="NAME", help="The array with the imaginary parts of --variable."),
    click.option("--select", metavar="DIM=LABEL", multiple=True,
                 help="Invert a part: time=2026-01-02, or from a label to another, y=0..99 or time=2026-01-01.., by "
                      "numbers where there are no labels. May be given several times."),
    click.option("--mask", metavar="NAME",
                 help="Leave matrices out where this array of the group is not 0; with ~NAME where it is 0."),
    click.option("--assume-a", type=click.Choice([*get_args(AssumeA), *SHORT_WORDS]), default="general",
                 show_default=True, help="What is known of the matrices."),
    click.option("--lower", is_flag=True,
                 help="Read symmetric and Hermitian matrices from their lower triangles, not their upper ones."),
    click.option("--min-rcond", type=float, default=0.0, metavar="X",
                 help="Matrices whose reciprocal condition number is below X count as failed."),
    click.option("--precision", type=click.Choice(get_args(Precision)), default="same", show_default=True,
                 help="Compute as the results are stored, or in double precision always."),
    click.option("--max-failed", default="0", show_default=True, metavar="LIMIT",
                 help="How many matrices may have no inverse before the exit code is 3: a number, a share such as "
                      "0.1%, 'any', or by kind: not-finite=any,singular=0."),
    click.option("--device", type=click.Choice(get_args(Device)), default="auto", show_default=True,
                 help="Where to invert."),
    click.option("--missing", type=click.Choice(get_args(Missing)), default="error", show_default=True,
                 help="A chunk that is not in the source is damage, or stands for matrices of its fill value."),
    click.option("--bad-chunks", type=click.Choice(get_args(BadChunks)), default="error", show_default=True,
                 help="Matrices in chunks that cannot be read are NaN, with info -4; that TARGET is not complete then, "
                      "or is all the same."),
    click.option("--keep", type=click.Choice(get_args(Keep)), default="inverse", show_default=True,
                 help="What of the inverses goes to TARGET: a diagonal has n numbers, not n x n."),
    click.option("--logdet", is_flag=True,
                 help="Also put there log|det| of each matrix, and the sign of its determinant."),
    click.option("--dtype", type=click.Choice(KEPT),
                 help="As what the results are stored. Default: as the matrices, if they are floating numbers."),
    click.option("--like-source", is_flag=True,
                 help="With --packed, --complex-dim or --imag: store inverses in that form, too."),
    click.option("--names", metavar="WHAT=NAME,...",
                 help="Other names for arrays of TARGET: inverse=precision,info=flag."),
    click.option("--compress", metavar="CODEC", help="Compress chunks of TARGET: zstd, blosc, or zstd:9."),
    click.option("--chunks", metavar="DIM=N,...",
                 help="How long chunks of TARGET are along batch dimensions. Default: by --tile-size."),
    click.option("--shards", metavar="DIM=N,...",
                 help="Let many chunks stand in a shard, the unit of work then, so long along these dimensions."),
    click.option("--zarr-format", type=click.Choice(["2", "3"]), default="3", show_default=True,
                 help="With 2 TARGET has metadata of that format too, for programs that read nothing else."),
    click.option("--tile-size", metavar="BYTES", help="Unit of work, and chunk of the target. Default: 32MiB."),
    click.option("--overwrite", is_flag=True,
                 help="Begin anew: replace a target of dask-batchinv, of this job or another, and nothing else ever. "
                      "To continue what was interrupted, leave it out."),
    click.option("--trust-ledger", is_flag=True,
                 help="Do not read back, or look for, what earlier runs have recorded as done."),
    click.option("--durable", is_flag=True,
                 help="Record a tile only when it is on the disk, so that a power failure loses nothing. Slower."),
)  # fmt: skip

cluster_options = _options(
    click.option("--scheduler", metavar="ADDRESS",
                 help="A running Dask scheduler, tls://host:port. Default: that of the Dask configuration "
                      "(DASK_SCHEDULER_ADDRESS), else processes on this machine."),
    click.option("--scheduler-file", metavar="FILE", help="The file to which a running scheduler wrote its address."),
    click.option("--wait-for-workers", type=click.IntRange(1), metavar="N",
                 help="Begin when a running scheduler has so many workers. Default: 1."),
    click.option("--for", "wait", metavar="TIME",
                 help="How long to wait for them, and for --scheduler-file, such as 2h. Default: 30s."),
    click.option("--only-workers", metavar="PATTERN", multiple=True,
                 help="Use only workers of a running scheduler whose name, address or host matches, such as 'gpu-*', "
                      "or that have a resource: 'resource:NAME'. May be given several times."),
    click.option("--insecure", is_flag=True,
                 help="Allow a scheduler on another machine without TLS: whoever reaches it can run code as you."),
    click.option("--restart-stalled", is_flag=True,
                 help="Restart workers that give no result even if they are not ours: others lose what is on them."),
    click.option("--workers", type=click.IntRange(1), metavar="N",
                 help="Processes on this machine. Default: one per core."),
    click.option("--threads-per-worker", type=click.IntRange(1), metavar="N",
                 help="Threads of each. Default: 1."),
    click.option("--dashboard", type=click.IntRange(0, 65535), metavar="PORT",
                 help="Serve Dask's dashboard on this port of this machine. Default: none."),
    click.option("--memory-limit", metavar="BYTES",
                 help="Memory of each, such as 4GiB. Default: a fair share of the machine."),
)  # fmt: skip

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of text, also of what goes wrong."
)

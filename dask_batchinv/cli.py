"""The command line: ``dask-batchinv`` and ``dask batchinv``."""

from __future__ import annotations

import json
import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import click
import dask.config

from dask_batchinv._version import __version__
from dask_batchinv.cli_options import cluster_options, job_options, json_option, source_options, target_options
from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.driver.placing import plan_for_unlike, plan_locally
from dask_batchinv.job.driver.run_job import run_job
from dask_batchinv.job.options import JobOptions
from dask_batchinv.job.plan.plan import Plan
from dask_batchinv.job.plan.prepare import Job, prepare
from dask_batchinv.job.report import display
from dask_batchinv.job.report.freshness import Freshness, Status, check_job, status_of
from dask_batchinv.job.report.run_record import OnProgress, Progress
from dask_batchinv.job.report.streams import Lasting, open_closed_descriptors
from dask_batchinv.job.target.swap import InterruptedWhenDone
from dask_batchinv.job.versions import check_optimized
from dask_batchinv.kernels.device import DeviceError
from dask_batchinv.location import Location, json_object
from dask_batchinv.outcome import RefusedError, SourceError, TargetError
from dask_batchinv.places import locate
from dask_batchinv.text import clean, clean_lines, clean_values

REFUSED = 2
#: Raised when what JSON objects say is called otherwise, or means something else.
SCHEMA = 1
INTERRUPTED = 130
INTERRUPTED_TEXT = "Interrupted. What is done is recorded: run the same command again for the rest."

EXIT_CODES = """
\b
Exit codes:
    0  done
    1  some tiles could not be done, or changed all the time: run the same command again
    2  refused before anything was written
    3  done, but more than --max-failed matrices have no inverse
    4  status and run --check: the target is not up to date with its source
    5  status and run --check: whether it is cannot be told
    6  status: a run is at work on the target
  130  interrupted: run the same command again
"""


class _Commands(click.Group):
    """Commands whose usage errors, which quote what was typed, may be shown."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _clean_usage_errors():
            return super().make_context(*args, **options)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        self._as_json = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _clean_usage_errors(self._as_json):
            return super().invoke(ctx)


@contextmanager
def _clean_usage_errors(as_json: bool = False) -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        error.message = clean(error.message)  # type: ignore[misc]  # final, for type checkers
        if as_json:
            told = {"kind": type(error).__name__, "message": clean(error.format_message())}
            _say(_json({"error": told, "exit_code": REFUSED}))
        raise


@click.group(
    name="batchinv", cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES
)
@click.version_option(__version__, prog_name="dask-batchinv")
def main() -> None:
    """Invert every matrix of a Zarr store, on a Dask cluster, with an account of each."""
    open_closed_descriptors()
    # What matters of this is in our own report and errors; the rest would bury it.
    for name in ("distributed", "asyncio", "tornado"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@main.command(epilog=EXIT_CODES)
@job_options
@cluster_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop, as `dask-batchinv plan`.")
@click.option("--check", is_flag=True, help="Print whether TARGET is up to date with SOURCE, and stop.")
@json_option
@click.option("--quiet", is_flag=True, help="No progress, and no report if all is well.")
def run(dry_run: bool, check: bool, as_json: bool, quiet: bool, **arguments: Any) -> None:
    """Invert all matrices of SOURCE into the Zarr group TARGET.

    SOURCE is a Zarr array (*, n, n), or a group with --variable: a path or an fsspec URL, format 2 or 3. TARGET gets
    `inverse` (*, n, n), `info` and `rcond` (*). If the command is interrupted, in whatever way, the same command
    does what is left. Once all is done, it does again what has changed in SOURCE since, and what has been appended.

    \b
    Examples:
      dask-batchinv run covariances.zarr inverses.zarr --variable cov --assume-a "positive definite"
      dask-batchinv run s3://bucket/a.zarr s3://bucket/x.zarr --scheduler tls://10.0.0.1:8786
    """
    with _exit_codes(as_json) as interrupts:
        job, cluster = _parse(arguments)
        if dry_run:
            _print_plan(_plan(job, cluster), as_json)
            return
        if check:
            _print_and_exit(check_job(job), as_json)
        with display.shown(enabled=not quiet) as on_progress:
            try:
                report = run_job(job, cluster, partial(_heed, interrupts, on_progress))
            except InterruptedWhenDone as end:
                report = end.report
        if as_json or not quiet or report.exit_code:
            _print(report, as_json)
        if report.exit_code == 1:
            _complain("Fix the cause and run the same command again: it does what is not done.")
        sys.exit(report.exit_code)


@main.command()
@job_options
@cluster_options
@json_option
def plan(as_json: bool, **arguments: Any) -> None:
    """Print what `run` would do: tiles, bytes, and the memory that a worker will need. Writes nothing."""
    with _exit_codes(as_json):
        _print_plan(_plan(*_parse(arguments)), as_json)


@main.command(epilog=EXIT_CODES)
@click.argument("target")
@click.option(
    "--source",
    metavar="SOURCE",
    help="What it was made from, if that has another address now, or one with credentials in it.",
)
@source_options
@target_options
@json_option
def status(as_json: bool, **arguments: Any) -> None:
    """Print how far the job that writes TARGET is, and whether it is up to date with its source.

    While a run is at work: who, since when, how fast, and how long it will take. Of the source coordinates are read;
    its chunks are listed.
    """  # fmt: skip
    with _exit_codes(as_json):
        target = _locate("target", arguments)
        if arguments["source"] is not None:
            _print_and_exit(status_of(target, _locate("source", arguments)), as_json)
        _print_and_exit(status_of(target, given=_options_of("source", arguments)), as_json)


@main.command("verify")
@click.argument("target")
@click.option("--source", metavar="SOURCE", help="Also multiply every matrix of SOURCE with its inverse.")
@click.option("--sample", type=float, default=1.0, show_default=True, metavar="SHARE",
              help="With --source: multiply the matrices of this share of the tiles.")  # fmt: skip
@source_options
@target_options
@cluster_options
@json_option
@click.option("--quiet", is_flag=True, help="No progress.")
def verify_command(sample: float, as_json: bool, quiet: bool, **arguments: Any) -> None:
    """Read TARGET back, every chunk of its arrays, and check it. Exit code 1 if something is not right.

    What it finds, `run` repairs.
    """
    from dask_batchinv.job.driver.verify import (
        verify,  # with it Dask's cluster is imported, which small jobs do without
    )

    with _exit_codes(as_json, "Interrupted.") as interrupts:
        target, source = _locate("target", arguments), _source_if_given(arguments)
        with display.shown(enabled=not quiet) as on_progress:
            heed = partial(_heed, interrupts, on_progress)
            report = verify(target, source, ClusterOptions(**arguments), sample, heed)
        _print(report, as_json)
        sys.exit(report.exit_code)


_CLUSTER_ARGUMENTS = (
    "scheduler",
    "scheduler_file",
    "wait_for_workers",
    "wait",
    "only_workers",
    "insecure",
    "restart_stalled",
    "workers",
    "threads_per_worker",
    "memory_limit",
    "dashboard",
)


def _heed(interrupts: _Interrupts, on_progress: OnProgress | None, now: Progress) -> None:
    """Show progress, and stop if somebody asked for that."""
    interrupts.check()
    if on_progress is not None:
        on_progress(now)


def _parse(arguments: dict[str, Any]) -> tuple[Job, ClusterOptions]:
    cluster = ClusterOptions(**{name: arguments.pop(name) for name in _CLUSTER_ARGUMENTS})
    source = _locate("source", arguments)
    target = _locate("target", arguments)
    if target.is_memory:
        raise RefusedError(f"the target {target.name} would end with this command: choose a path or a store")
    arguments["zarr_format"] = int(arguments["zarr_format"])
    arguments["select"] = _selection(arguments["select"])
    arguments["names"] = _pairs("names", arguments["names"], "WHAT=NAME")
    arguments["chunks"] = _lengths("chunks", arguments["chunks"]) or {}
    arguments["shards"] = _lengths("shards", arguments["shards"])
    if arguments["dims"] is not None:
        arguments["dims"] = tuple(arguments["dims"].split(","))
    return prepare(source, target, JobOptions(**arguments)), replace(cluster, device=arguments["device"])


def _selection(texts: tuple[str, ...]) -> dict[str, str]:
    """Return what --select says."""
    pairs = [text.partition("=") for text in texts]
    if bad := [dim for dim, mark, _ in pairs if not mark or not dim]:
        raise RefusedError(f"--select takes DIM=LABEL or DIM=FIRST..LAST, got {bad[0]!r}")
    return _each_once("select", [(dim, label) for dim, _, label in pairs])


def _pairs(option: str, text: str | None, form: str) -> dict[str, str]:
    """Return what an option says that takes pairs."""
    pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
    if bad := [what for what, mark, _ in pairs if not mark]:
        raise RefusedError(f"--{option} takes {form},{form}, got {bad[0]!r}")
    return _each_once(option, [(what.strip(), name.strip()) for what, _, name in pairs])


def _each_once(option: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RefusedError(f"--{option} names something twice: {', '.join(what for what, _ in pairs)}")
    return found


def _lengths(option: str, text: str | None) -> dict[str, int] | None:
    """Return lengths by dimension; None if the option was not given."""
    if text is None:
        return None
    pairs = _pairs(option, text, "DIM=LENGTH")
    if bad := [f"{dim}={size}" for dim, size in pairs.items() if not size.isdecimal()]:
        raise RefusedError(f"--{option} takes DIM=LENGTH,DIM=LENGTH, got {bad[0]!r}")
    return {dim: int(size) for dim, size in pairs.items()}


def _options_of(name: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the file system of an argument is given; of what was typed, which may be secret, nothing is shown."""
    if (text := arguments.pop(f"{name}_options")) is None:
        return None
    try:
        if text.lstrip().startswith("{"):
            return json_object(text, "it")
        found = dask.config.get(text)
    except (ValueError, KeyError, TypeError, IndexError):
        found = None
    if not isinstance(found, dict):
        why = "this is neither" if found is None else f"that name has a {type(found).__name__} there"
        raise RefusedError(f"--{name}-options takes a JSON object, or the name of one in the Dask configuration: {why}")
    return found


def _locate(name: str, arguments: dict[str, Any]) -> Location:
    """Return the location of an argument, with its options."""
    try:
        return locate(arguments.pop(name), _options_of(name, arguments))
    except ValueError as error:
        raise (SourceError if name == "source" else TargetError)(f"{name}: {error}") from error


def _source_if_given(arguments: dict[str, Any]) -> Location | None:
    if arguments["source"] is not None:
        return _locate("source", arguments)
    arguments.pop("source")
    arguments.pop("source_options")
    return None


def _plan(job: Job, cluster: ClusterOptions) -> Plan:
    cluster = cluster.resolved()
    if cluster.is_local:
        return plan_locally(job, cluster)
    from dask_batchinv.job.driver.cluster import connect, count_gpus

    with connect(cluster) as (client, (first, *others)):
        gpus = count_gpus(job.options.device, client, cluster.only_workers)
        made, _ = plan_for_unlike(job, [replace(first, gpus=gpus), *others])
        return replace(made, where=cluster.where(client))


def _print_plan(made: Plan, as_json: bool) -> None:
    _say(_json(made.to_json() | {"exit_code": 0}) if as_json else made.describe())


def _print(report: Any, as_json: bool) -> None:
    _say(_json(report.to_json()) if as_json else clean_lines(str(report)))


def _json(content: dict[str, Any]) -> str:
    return json.dumps({"schema": SCHEMA} | clean_values(content))


def _print_and_exit(found: Status | Freshness, as_json: bool) -> NoReturn:
    _print(found, as_json)
    sys.exit(found.exit_code)


def _say(text: str) -> None:
    """Print a text that may be shown; where nobody reads it any more, that is no fault."""
    if failure := _written(text, sys.stdout):
        _complain(f"Error: the output could not be written: {failure}")


def _complain(text: str) -> None:
    _written(clean_lines(text), sys.stderr)


def _written(text: str, stream: Any) -> OSError | None:
    lasting = Lasting(stream)
    print(text, file=lasting, flush=True)
    return lasting.failure


class _Interrupts:
    """Ctrl-C of a person, and SIGTERM of a batch system, which asks for the same."""

    def __init__(self) -> None:
        self._asked = False
        self._handlers: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def check(self) -> None:
        """Raise KeyboardInterrupt again if somebody asked for one: Python drops what is raised in a destructor."""
        if self._asked:
            raise KeyboardInterrupt

    def __enter__(self) -> _Interrupts:
        for sign in (signal.SIGINT, signal.SIGTERM):
            # A shell lets what it runs in the background ignore Ctrl-C.
            if sign == signal.SIGTERM or signal.getsignal(sign) != signal.SIG_IGN:
                self._handlers[sign] = signal.signal(sign, self._ask)
        sys.unraisablehook = self._drop
        return self

    def __exit__(self, *args: object) -> None:
        for sign, handler in self._handlers.items():
            signal.signal(sign, handler or signal.SIG_DFL)
        sys.unraisablehook = self._hook

    def _ask(self, sign: int, frame: Any) -> None:
        self._asked = True
        raise KeyboardInterrupt

    def _drop(self, dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):  # `check` will raise that again
            self._hook(dropped)


@contextmanager
def _exit_codes(as_json: bool, interrupted: str = INTERRUPTED_TEXT) -> Iterator[_Interrupts]:
    """Turn what may go wrong into messages and exit codes."""

    def end(code: int, error: BaseException, text: str) -> NoReturn:
        _complain(text)
        if as_json:
            told = {"kind": type(error).__name__, "message": str(error) or text}
            _say(_json({"error": told, "exit_code": code}))
        sys.exit(code)

    with _Interrupts() as interrupts:
        try:
            check_optimized()
            yield interrupts
        except (RefusedError, DeviceError) as error:
            end(REFUSED, error, f"Error: {clean(str(error))}")
        except OSError as error:  # a lost cluster, a full disk
            end(1, error, f"Error: {clean(str(error))}")
        except KeyboardInterrupt as error:
            end(INTERRUPTED, error, interrupted)
        except Exception as error:  # not foreseen: what Python prints, but such that it may be shown
            end(1, error, traceback.format_exc().rstrip())


if __name__ == "__main__":
    main()

"""The command line: ``dask-batchinv`` and ``dask batchinv``."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

import click
import dask.config

from dask_batchinv._version import __version__
from dask_batchinv.cli_arguments import locate_argument, options_of, parse, source_if_given
from dask_batchinv.cli_options import cluster_options, job_options, json_option, source_options, target_options
from dask_batchinv.cli_spelling import spelled, spelled_values
from dask_batchinv.job.driver.cluster_options import ClusterOptions
from dask_batchinv.job.driver.run_job import plan_job, run_job
from dask_batchinv.job.plan.plan import Plan
from dask_batchinv.job.report import display
from dask_batchinv.job.report.at_work import watch
from dask_batchinv.job.report.freshness import Freshness, Status, check_job, status_of
from dask_batchinv.job.report.page.page import check_matplotlib, check_output
from dask_batchinv.job.report.page.target_report import report_of
from dask_batchinv.job.report.run_record import OnProgress, Progress
from dask_batchinv.job.report.streams import Lasting, open_closed_descriptors
from dask_batchinv.job.target.swap import InterruptedWhenDone
from dask_batchinv.job.versions import check_optimized
from dask_batchinv.kernels.device import DeviceError
from dask_batchinv.location import Location
from dask_batchinv.outcome import RefusedError
from dask_batchinv.text import clean, clean_lines, clean_values

REFUSED = 2
#: Raised when what JSON objects say is called otherwise, or means something else.
SCHEMA = 1
INTERRUPTED = 130
#: The loggers that are not heard.
_SILENT = ("distributed", "distributed.client", "asyncio", "tornado", "tornado.application")
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
    # What matters of this is in our own report and errors; the rest would bury it. Not by levels, which Dask's cluster
    # sets as the configuration says when it is imported later.
    dask.config.set({"logging": dict.fromkeys(_SILENT, "critical")})


@main.command(epilog=EXIT_CODES)
@job_options
@cluster_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop, as `dask-batchinv plan`.")
@click.option("--check", is_flag=True, help="Print whether TARGET is up to date with SOURCE, and stop.")
@json_option
@click.option("--quiet", is_flag=True, help="No progress, and no report if all is well.")
@click.option(
    "--report", "page", metavar="FILE", help="In the end write a report with pictures, an HTML page, to FILE."
)
def run(dry_run: bool, check: bool, as_json: bool, quiet: bool, page: str | None, **arguments: Any) -> None:
    """Invert all matrices of SOURCE into the Zarr group TARGET.

    SOURCE is a Zarr array (*, n, n), or a group with --variable: a path or an fsspec URL, format 2 or 3. TARGET gets
    `inverse` (*, n, n), `info` and `rcond` (*). If the command is interrupted, in whatever way, the same command
    does what is left. Once all is done, it does again what has changed in SOURCE since, and what has been appended.

    \b
    Examples:
      dask-batchinv run covariances.zarr inverses.zarr --variable cov --assume-a "positive definite"
      dask-batchinv run s3://bucket/a.zarr s3://bucket/x.zarr --scheduler tls://10.0.0.1:8786
    """
    with _exit_codes(as_json, INTERRUPTED_TEXT if not (dry_run or check) else "Interrupted.") as interrupts:
        job, cluster = parse(arguments)
        if page is not None:
            check_output(page, job.target.name, job.source.location.name, job.source.variable)
        if dry_run:
            _print_plan(plan_job(job, cluster), as_json)
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
        if page is not None:
            _write_page(job.target, page)
        if report.exit_code == 1:
            _complain("Fix the cause and run the same command again: it does what is not done.")
        sys.exit(report.exit_code)


@main.command()
@job_options
@cluster_options
@json_option
def plan(as_json: bool, **arguments: Any) -> None:
    """Print what `run` would do: tiles, bytes, and the memory that a worker will need. Writes nothing."""
    with _exit_codes(as_json, "Interrupted."):
        _print_plan(plan_job(*parse(arguments)), as_json)


@main.command(epilog=EXIT_CODES)
@click.argument("target")
@click.option(
    "--source",
    metavar="SOURCE",
    help="What it was made from, if that has another address now, or one with credentials in it.",
)
@source_options
@target_options
@click.option("--follow", is_flag=True, help="While a run is at work there, show its progress; then the status.")
@json_option
def status(follow: bool, as_json: bool, **arguments: Any) -> None:
    """Print how far the job that writes TARGET is, and whether it is up to date with its source.

    While a run is at work: who, since when, how fast, and how long it will take. Of the source coordinates are read;
    its chunks are listed.
    """  # fmt: skip
    with _exit_codes(as_json, "Interrupted. The run that was watched goes on." if follow else "Interrupted."):
        target = locate_argument("target", arguments)
        if follow:
            with display.shown(enabled=not as_json) as on_progress:
                for account, at_work in watch(target):
                    if as_json:
                        _say(_json(account.to_json() | {"at_work": asdict(at_work)}))
                    elif on_progress is not None:
                        on_progress(at_work.progress(account))
        if arguments["source"] is not None:
            _print_and_exit(status_of(target, locate_argument("source", arguments)), as_json)
        _print_and_exit(status_of(target, given=options_of("source", arguments)), as_json)


@main.command("report")
@click.argument("target")
@target_options
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Write a page with pictures to FILE, HTML that needs nothing else; to - for stdout.",
)
@json_option
def report_command(output: str | None, as_json: bool, **arguments: Any) -> None:
    """Print what TARGET tells, complete or not: which matrices have no inverse, where they are and why.

    The page has all of it: failures with their coordinates, maps of them and of the condition numbers, a histogram of
    these, what runs, workers and tiles took. It takes seconds, for any stack.

    \b
    Examples:
      dask-batchinv report inverses.zarr -o report.html
      dask-batchinv report inverses.zarr --json
    """
    with _exit_codes(as_json, "Interrupted."):
        if as_json and output is not None:
            raise RefusedError("a report is a page or JSON, not both: leave --output or --json out")
        if output is not None:
            check_matplotlib()
        found = report_of(locate_argument("target", arguments))
        if output is None:
            _print(found, as_json)
        elif output == "-":
            _say(found.to_html())
        else:
            found.to_html(output)
            _complain(f"report: {clean(os.path.abspath(output))}")


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
        target, source = locate_argument("target", arguments), source_if_given(arguments)
        with display.shown(enabled=not quiet) as on_progress:
            heed = partial(_heed, interrupts, on_progress)
            report = verify(target, source, ClusterOptions(**arguments), sample, heed)
        _print(report, as_json)
        sys.exit(report.exit_code)


def _heed(interrupts: _Interrupts, on_progress: OnProgress | None, now: Progress) -> None:
    """Show progress, and stop if somebody asked for that."""
    interrupts.check()
    if on_progress is not None:
        on_progress(now)


def _print_plan(made: Plan, as_json: bool) -> None:
    _say(_json(made.to_json() | {"exit_code": 0}) if as_json else spelled(str(made), _command()))


def _print(report: Any, as_json: bool) -> None:
    _say(_json(report.to_json()) if as_json else clean_lines(spelled(str(report), _command())))


def _write_page(target: Location, path: str) -> None:
    """Write the report of a run; the job is done whether that can be done or not."""
    try:
        report_of(target).to_html(path)
        _complain(f"report: {clean(os.path.abspath(path))}")
    except (OSError, RefusedError) as error:
        _complain(f"Error: the report was not written: {error}")


def _json(content: dict[str, Any]) -> str:
    return json.dumps({"schema": SCHEMA} | clean_values(spelled_values(content, _command())))


def _command() -> click.Command:
    """Return the command that is running."""
    return click.get_current_context().command


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
def _exit_codes(as_json: bool, interrupted: str) -> Iterator[_Interrupts]:
    """Turn what may go wrong into messages and exit codes."""

    def end(code: int, error: BaseException, text: str) -> NoReturn:
        _complain(spelled(text, _command()))
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

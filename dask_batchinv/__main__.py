"""``python -m dask_batchinv``, and where the command begins: it may be interrupted while all else is imported."""

import sys

#: As of the command itself.
_INTERRUPTED = 130


def main() -> None:
    """Run the command."""
    try:
        from dask_batchinv import cli
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(_INTERRUPTED)
    cli.main()


if __name__ == "__main__":
    main()

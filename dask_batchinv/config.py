"""The defaults of the Dask configuration ``batchinv``, from batchinv.yaml."""

from pathlib import Path

import dask.config
import yaml


def set_defaults() -> None:
    """Make them known to Dask."""
    dask.config.update_defaults(yaml.safe_load((Path(__file__).parent / "batchinv.yaml").read_text()))

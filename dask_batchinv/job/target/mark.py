"""Our mark on a group: what it is made of, and how far it is.

It stands in the group, and a copy of it in the ledger, by which a group whose own document was lost is still ours.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from dask_batchinv.location import json_object
from dask_batchinv.storage import MARK

#: Raised when targets of older versions cannot be continued by this one.
FORMAT = 9

Mark = dict[str, Any]


def read_mark(attributes: dict[str, Any]) -> Mark | None:
    """Return the mark among the attributes of a group; None if it is not ours."""
    mark = attributes.get(MARK)
    if isinstance(mark, str):
        with suppress(ValueError, RecursionError):
            mark = json.loads(mark)
    return mark if isinstance(mark, dict) else None


def marked(complete: bool, mark: Mark) -> dict[str, Any]:
    """Return the attributes of a target. NetCDF has no truth values."""
    return {"complete": int(complete), MARK: json.dumps(mark)}


def with_attributes(document: bytes, changes: dict[str, Any]) -> bytes:
    """Return the metadata document of a group with some attributes changed; those not named stay, if it has any."""
    try:
        meta = json_object(document, "metadata")
    except ValueError:
        meta = {"zarr_format": 3, "node_type": "group"}
    return json.dumps(meta | {"attributes": attributes_of(meta) | changes}, indent=2).encode()


def attributes_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes in metadata; none if they are damaged."""
    attributes = meta.get("attributes")
    return attributes if isinstance(attributes, dict) else {}

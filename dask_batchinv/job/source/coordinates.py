"""The coordinates of a source: what stands beside the stack and says where its matrices are, found and read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import dask
import xarray as xr

from dask_batchinv.attributes import PLACING
from dask_batchinv.job.source.metadata import Node, check_coordinate, is_name, read_node, stored_names
from dask_batchinv.labels import Index
from dask_batchinv.location import Location, raised_as
from dask_batchinv.outcome import SourceError
from dask_batchinv.storage import unspecified


@dataclass(frozen=True)
class Coordinates:
    """Arrays of one group that are coordinates of the stack, or what those name."""

    group: Location
    """The group."""
    names: tuple[str, ...]
    """Their names in it."""

    def read(self, only: str | None = None) -> xr.Dataset:
        """Read them, or one, undecoded, into memory. SourceError if that fails."""
        wanted = self.names if only is None else (only,)
        failing = raised_as(SourceError, f"the coordinates of {self.group.name} cannot be read")
        with failing, unspecified(), dask.config.set(scheduler="threads"):
            others = [name for name, _ in array_nodes(self.group) if name not in wanted]
            found = xr.open_zarr(
                self.group.store(read_only=True), consolidated=False, drop_variables=others, chunks={},
                mask_and_scale=False, decode_times=False,
            ).load()  # fmt: skip
        # What the source had for codecs and chunks is not for the target.
        bare: xr.Dataset = found.drop_encoding().drop_attrs(deep=False)
        return bare


def names_of(parts: tuple[Coordinates, ...]) -> tuple[str, ...]:
    """Return the names of all."""
    return tuple(name for part in parts for name in part.names)


def find(root: Location, inner: str, node: Node, sizes: dict[str, int], variable: str) -> tuple[Coordinates, ...]:
    """Return the coordinates of a variable, by CF's and Xarray's rules.

    Parameters
    ----------
    root : Location
        The group that the user named.
    inner : str
        The group below it that the variable is in; empty for `root` itself. What is labelled further up is
        inherited, as in a DataTree.
    node : Node
        The variable.
    sizes : dict
        Names and lengths of its dimensions.
    variable : str
        Its name.

    Raises
    ------
    SourceError
        If a coordinate does not fit, or is not safe to read.
    """
    own = root / inner if inner else root
    found = [Coordinates(own, tuple(_beside(own, node, sizes, variable)))]
    above = [inner.rpartition("/")[0]] if inner else []
    while above and above[-1]:
        above.append(above[-1].rpartition("/")[0])
    for path in above:
        group, known = (root / path if path else root), {name for part in found for name in part.names}
        inherited = (name for name in sizes if name not in known and _is_coordinate(group, name, sizes))
        found.append(Coordinates(group, tuple(inherited)))
    return tuple(part for part in found if part.names)


def _beside(group: Location, node: Node, sizes: dict[str, int], variable: str) -> Iterator[str]:
    """Yield what stands in the group of the variable and belongs to it."""
    root = read_node(group)
    if root is None:
        return
    # An extended grid mapping is "name: coordinate coordinate name: …".
    # Whatever one variable of a group names is a coordinate of all that it fits, to Xarray.
    others = array_nodes(group, group.known_children())
    attributes = [node.attributes, root.attributes, *(other.attributes for _, other in others)]
    texts = [own.get(name) for own in attributes for name in PLACING]
    named = {name.rstrip(":") for text in texts if isinstance(text, str) for name in text.split()}
    for name in sorted(filter(is_name, {*sizes, *named} - {variable})):  # others would lead out of the group
        if _is_coordinate(group, name, sizes):
            yield name


def _is_coordinate(group: Location, name: str, sizes: dict[str, int]) -> bool:
    root = read_node(group)
    # In the format of the group, for in that Xarray will read it.
    coordinate = None if root is None else read_node(group / name, root.zarr_format)
    if coordinate is None or not coordinate.is_array:
        return False
    along = stored_names(coordinate) or ()
    if not set(along) <= set(sizes):
        return False
    if len(along) and tuple(sizes[str(dim)] for dim in along) != coordinate.shape:
        raise SourceError(f"the coordinate {(group / name).name} is not as long as its dimensions")
    check_coordinate(coordinate)
    return True


def read_labels(parts: tuple[Coordinates, ...], dim: str) -> Index | None:
    """Read the labels of a dimension; None if it has none."""
    for part in parts:
        if dim in part.names:
            stored = part.read(only=dim)
            with raised_as(SourceError, f"the labels of {dim} in {part.group.name} cannot be decoded"):
                return xr.decode_cf(stored)[dim].to_index()
    return None


def array_nodes(group: Location, names: list[str] | None = None) -> Iterator[tuple[str, Node]]:
    """Yield the arrays of a group, or those of some names, with their names."""
    for name in group.children() if names is None else names:
        node = read_node(group / name)
        if node is not None and node.is_array:
            yield name, node

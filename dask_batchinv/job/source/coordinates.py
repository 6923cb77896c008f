"""The coordinates of a source: what stands beside the stack and says where its matrices are, found and read."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dask_batchinv.attributes import PLACING
from dask_batchinv.job.source.bounded_decoding import TextAllowance
from dask_batchinv.job.source.coordinate import Coordinate
from dask_batchinv.job.source.metadata import Node, is_name, read_node, stored_names
from dask_batchinv.labels import Index
from dask_batchinv.location import Location, raised_as
from dask_batchinv.outcome import SourceError
from dask_batchinv.storage import DamagedChunkError, unspecified
from dask_batchinv.text import clean

if TYPE_CHECKING:
    import xarray as xr

#: All coordinates together may take so many bytes, all of their chunks decoded.
COORDINATES_NBYTES = 2**30
#: What metadata that make no sense become, or that may not be read; what a network raises is none of these.
_BROKEN = (ValueError, RecursionError, PermissionError)
#: What chunks that are damaged become.
_DAMAGED = (
    *(DamagedChunkError, ValueError, TypeError, LookupError, RuntimeError, EOFError),
    *(zlib.error, lzma.LZMAError),
)
#: A reason may be so long.
_REASON_LENGTH = 500


@dataclass
class Found:
    """What stands beside a stack."""

    coordinates: dict[str, Coordinate] = field(default_factory=dict)
    """Those that can be read, by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why others cannot, by name."""

    def leave_out(self, name: str, error: Exception) -> None:
        """Note that something is not read."""
        self.left_out[name] = _reason(error)

    def labels(self, dim: str) -> Index | None:
        """Return the labels of a dimension which decide what comes out; None if it has none."""
        if dim in self.left_out:
            raise SourceError(f"the labels of {dim}, which decide what comes out, cannot be read: {self.left_out[dim]}")
        if dim not in self.coordinates:
            return None
        import xarray as xr

        stored = read([self.coordinates[dim]])
        with raised_as(SourceError, f"the labels of {dim} cannot be decoded"):
            return xr.decode_cf(stored)[dim].to_index()

    def notes(self) -> tuple[str, ...]:
        """Return a sentence for each that is left out."""
        return tuple(_note(name, why) for name, why in sorted(self.left_out.items()))


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, SourceError) else f"{type(error).__name__}: "
    return clean(f"{kind}{error}")[:_REASON_LENGTH]


def _note(name: str, why: str) -> str:
    return f"{ascii(name)[1:-1]} beside the stack was left out: {why}"


def find(root: Location, inner: str, node: Node, sizes: dict[str, int], variable: str) -> Found:
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
    """
    own, found = root / inner if inner else root, Found()
    _add(found, own, _beside(own, node, sizes, variable, found), sizes)
    above = [inner.rpartition("/")[0]] if inner else []
    while above and above[-1]:
        above.append(above[-1].rpartition("/")[0])
    for path in above:
        names = [name for name in sizes if name not in found.coordinates and name not in found.left_out]
        _add(found, root / path if path else root, names, sizes)
    _keep_to_limit(found, sizes)
    return found


def _beside(group: Location, node: Node, sizes: dict[str, int], variable: str, found: Found) -> Iterator[str]:
    """Yield the names of what may stand in the group of the variable and belong to it."""
    root = read_node(group)
    if root is None:
        return
    children = group.known_children()
    others, broken = array_nodes(group, children)
    for name in broken.keys() - {variable}:
        found.leave_out(name, broken[name])
    # An extended grid mapping is "name: coordinate coordinate name: …".
    # Whatever one variable of a group names is a coordinate of all that it fits, to Xarray.
    attributes = [node.attributes, root.attributes, *(other.attributes for other in others.values())]
    texts = [own.get(name) for own in attributes for name in PLACING]
    named = {name.rstrip(":") for text in texts if isinstance(text, str) for name in text.split()}
    if children:  # else a server does not list them
        named &= {*children}
    # Others would lead out of the group.
    yield from sorted(filter(is_name, {*sizes, *named} - {variable} - found.left_out.keys()))


def _add(found: Found, group: Location, names: Iterable[str], sizes: dict[str, int]) -> None:
    """Add what is a coordinate of some names in a group."""
    root = read_node(group)
    if root is None:
        return
    for name in names:
        try:
            # In the format of the group, for in that Xarray would read it.
            node = read_node(group / name, root.zarr_format)
            if node is not None and node.is_array and _fits(node, sizes):
                found.coordinates[name] = Coordinate.judged(name, node)
        except (*_BROKEN, TypeError, LookupError, AttributeError) as error:  # the latter of Zarr's making
            found.leave_out(name, error)


def _fits(node: Node, sizes: dict[str, int]) -> bool:
    along = stored_names(node) or []
    if not set(along) <= set(sizes):
        return False
    if tuple(sizes[str(dim)] for dim in along) != node.shape:
        raise SourceError(f"the coordinate {node.location.name} is not as long as its dimensions")
    return True


def _keep_to_limit(found: Found, sizes: Mapping[str, int]) -> None:
    """Leave out what is too much for the memory: labels of dimensions come first."""
    left = COORDINATES_NBYTES
    for name in sorted(found.coordinates, key=lambda name: (name not in sizes, name)):
        if (nbytes := found.coordinates[name].nbytes) > left:
            what = f"it may take {nbytes:,} bytes, and all coordinates together may take {COORDINATES_NBYTES:,}"
            found.leave_out(name, SourceError(f"{what}: store it in smaller chunks, or drop it"))
            del found.coordinates[name]
        else:
            left -= nbytes


def read(
    coordinates: Iterable[Coordinate], *, needed: Collection[str] = (), notes: list[str] | None = None
) -> xr.Dataset:
    """Read coordinates, undecoded, into memory.

    Parameters
    ----------
    coordinates
        Which.
    needed
        Names of those that decide what comes out.
    notes
        Gets a sentence for each that is damaged, and not needed; without it that is an error.

    Raises
    ------
    SourceError
        If that fails.
    """
    variables: dict[str, xr.Variable] = {}
    allowance = TextAllowance()
    for each in coordinates:
        with raised_as(SourceError, f"the coordinates of {each.group} cannot be read, {each.name}"):
            try:
                variables[each.name] = _undecoded({each.name: each.read(allowance)}).variables[each.name]
            except _DAMAGED as error:
                if notes is None or each.name in needed:
                    raise
                notes.append(_note(each.name, _reason(error)))
    with raised_as(SourceError, "the coordinates cannot be read together"):
        found = _undecoded(variables, decode_coords=True)
    # What the source had for codecs and chunks is not for the target.
    bare: xr.Dataset = found.drop_encoding()
    return bare


def _undecoded(variables: dict[str, xr.Variable], *, decode_coords: bool = False) -> xr.Dataset:
    """Return variables as Xarray gives them where numbers and times are not to be decoded."""
    import xarray as xr

    how: dict[str, Any] = {"mask_and_scale": False, "decode_times": False, "decode_coords": decode_coords}
    with unspecified():
        found: xr.Dataset = xr.decode_cf(xr.Dataset(variables), **how).load()
    return found


def array_nodes(group: Location, names: Iterable[str]) -> tuple[dict[str, Node], dict[str, Exception]]:
    """Return the arrays among some names in a group, and why the metadata of others make no sense."""
    nodes: dict[str, Node] = {}
    broken: dict[str, Exception] = {}
    for name in names:
        try:
            node = read_node(group / name)
            if node is not None and node.is_array:
                stored_names(node)
                nodes[name] = node
        except _BROKEN as error:
            broken[name] = error
    return nodes, broken

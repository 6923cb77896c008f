"""Which array of a source is the stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dask_batchinv.attributes import packing_of
from dask_batchinv.job.source.absent import what_is_there
from dask_batchinv.job.source.coordinates import array_nodes
from dask_batchinv.job.source.metadata import Node, is_floating, member_names, read_node, stored_names
from dask_batchinv.location import Location
from dask_batchinv.outcome import SourceError
from dask_batchinv.stack import shown
from dask_batchinv.urls import without


def find_stack(root: Location, variable: str | None, dims: Sequence[str] | None) -> tuple[Node, str | None]:
    """Return the array that is meant, and its name in the group if it is in one."""
    if variable is not None and not isinstance(variable, str):
        raise SourceError(f"variable takes the name of an array in the group, got {shown(variable)}")
    node = read_node(root)
    if node is None:
        raise SourceError(what_is_there(root))
    if node.is_array:
        if variable is not None:
            raise SourceError(f"{root.name} is an array, not a group: leave `variable=` out")
        return node, None
    variable = _known_variable(root, variable, dims)
    node = read_node(root / variable)
    if node is None or not node.is_array:
        raise SourceError(f"there is no variable {variable!r} in {root.name}; it has {_listed(root) or 'no arrays'}")
    return node, variable


def group_of(place: Location, variable: str | None) -> Location:
    """Return the group of a stack that is known by its name in it, also for the place of the array itself.

    Reports print that as the source.

    Raises
    ------
    SourceError
        If the place is that of another array.
    """
    if variable is None or (node := read_node(place)) is None or not node.is_array:
        return place
    if (above := without(place.url, variable)) == place.url:
        raise SourceError(
            f"{place.name} is an array, but the target was made from {variable} in a group: give the group in which "
            "that is"
        )
    return replace(place, url=above)


def _known_variable(group: Location, variable: str | None, dims: Sequence[str] | None) -> str:
    if variable is not None:
        if not variable or {"..", "."} & set(variable.split("/")) or variable.startswith("/"):
            raise SourceError(f"variable {variable!r} is not a name inside the group")
        return variable
    names = member_names(group)
    if not names:
        raise SourceError(f"{group.name} is a group, and its server does not list it: name the stack with `variable=`")
    nodes, _ = array_nodes(group, names)
    stacks = {name: node for name, node in nodes.items() if _may_be_stack(node, dims)}
    # Masks and counts often have the same dimensions.
    real = [name for name, node in stacks.items() if is_floating(node) or packing_of(node.attributes)]
    for chosen in (real, [*stacks]):
        if len(chosen) == 1:
            return chosen[0]
    if not (listed := _listed(group)):
        raise SourceError(f"{group.name} is a group without arrays")
    raise SourceError(f"{group.name} is a group: name the stack with `variable=`; it has {listed}")


def _may_be_stack(node: Node, dims: Sequence[str] | None) -> bool:
    if dims is not None:
        return set(dims) <= set(stored_names(node) or ())
    return len(node.shape) >= 2 and node.shape[-1] == node.shape[-2]


def _listed(group: Location) -> str:
    nodes, broken = array_nodes(group, member_names(group))
    texts = [f"{name} {node.shape}" for name, node in nodes.items()]
    return ", ".join([*texts, *(f"{name} (not usable: name it with `variable=` to see why)" for name in broken)])

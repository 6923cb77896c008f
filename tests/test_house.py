"""The rules of the house: one direction of imports, a front door that is documented."""

import ast
import doctest
import graphlib
import importlib
import pkgutil
from pathlib import Path

import pytest

import dask_batchinv

PACKAGE = Path(dask_batchinv.__file__).parent
#: The floors, from the ground up: a room (a module, or a folder with all that is in it) may import what is on lower
#: floors, and nothing of its own floor.
FLOORS = [
    ["text", "disk", "known", "transaction", "requests", "placed"],
    ["urls", "_version", "buffers", "config", "with_xarray", "stack", "labels", "attributes", "shown"],
    ["outcome", "storage", "kernels.blas_threads", "kernels.code_cache", "kernels.device"],
    ["kernels.lapack", "kernels.emit", "kernels.widened", "torch_tensors"],
    ["address", "kernels.threads"],
    ["kernels.cpu", "kernels.cuda", "location", "chunks"],
    ["repositories"],
    ["kernels", "unfinished", "places"],
    ["out"],
    ["options"],
    ["containers", "job.allowed", "job.settings", "job.tiling", "job.form"],
    ["array", "job.events", "job.versions", "job.outputs"],
    ["job.options"],
    ["job.seen", "job.results"],
    ["labelled", "job.source"],
    ["accessor"],
    ["job.target"],
    ["job.plan", "job.worker"],
    ["job.report"],
    ["job.driver"],
    ["job.api", "cli_options", "cli_arguments", "cli_spelling"],
    ["job"],
    [""],
    ["cli"],
    ["__main__"],
]
#: What the floors would let through, and what may not be: workers lock nothing, kernels know no stores.
FORBIDDEN = [("job.worker", "job.target.lock"), ("job.report", "job.worker"), ("kernels", "storage")]
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    for path in PACKAGE.rglob("*.py")
)


def path_of(module):
    path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(module):
    """Yield what a module imports of the package, at any depth of its code."""
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.startswith("dask_batchinv") for name in node.names), "write: from … import …"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the whole name"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dask_batchinv":
            base = node.module.removeprefix("dask_batchinv").lstrip(".")
            for name in node.names:
                inner = f"{base}.{name.name}".lstrip(".")
                yield inner if inner in MODULES else base


def room_of(module):
    """Return the innermost room that a module is in: for a front door, its own."""
    while module not in ROOMS and "." in module:
        module = module.rpartition(".")[0]
    return module


def test_every_module_has_a_room():
    assert {room_of(module) for module in MODULES} == set(ROOMS)
    # Front doors have rooms of their own, and what is behind them does not fall into those.
    assert all(module == room_of(module) or room_of(module) not in ("job", "kernels", "") for module in MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for other in imported(module):
        here, there = room_of(module), room_of(other)
        assert here == there or ROOMS[there] < ROOMS[here], f"{module} imports {other}"
        assert not any(module.startswith(a) and other.startswith(b) for a, b in FORBIDDEN), f"{module} imports {other}"


def test_imports_have_no_circle():
    graphlib.TopologicalSorter({module: set(imported(module)) - {module} for module in MODULES}).prepare()


def test_public_names_are_all_and_documented():
    assert sorted(dask_batchinv.__all__) == dask_batchinv.__all__
    readme = (PACKAGE.parent / "README.md").read_text() if (PACKAGE.parent / "README.md").exists() else ""
    for name in dask_batchinv.__all__:
        thing = getattr(dask_batchinv, name)
        assert thing.__doc__, name
        assert not thing.__doc__.startswith(name + "("), f"{name} has only a generated docstring"
        assert f"`{name}" in readme or f"{name}(" in readme or f".{name}" in readme, f"README does not mention {name}"


def test_public_names_are_found_where_users_find_them():
    for name in dask_batchinv.__all__:
        thing = getattr(dask_batchinv, name)
        assert thing.__module__ == "dask_batchinv" or not isinstance(thing, type), name
    assert (PACKAGE / "py.typed").exists()  # the types are for users' type checkers, too


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    found = importlib.import_module(f"dask_batchinv.{module}".rstrip("."))
    assert doctest.testmod(found, raise_on_error=False).failed == 0


def test_modules_are_all_importable_by_themselves():
    names = {name for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "dask_batchinv.")}
    assert names == {f"dask_batchinv.{module}" for module in MODULES if module}

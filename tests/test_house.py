"""The rules of the house: one direction of imports, a front door that is documented."""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import dask_batchinv

PACKAGE = Path(dask_batchinv.__file__).parent
#: Each module may import those above it.
ORDER = [
    "outcome",
    "stack",
    "place",
    "storage",
    "kernels.blas",
    "kernels.lapack",
    "kernels.machine",
    "kernels.values",
    "kernels.emit",
    "kernels.turning",
    "kernels.numbers",
    "kernels.scaling",
    "kernels.traffic",
    "kernels.group",
    "kernels.elimination",
    "kernels.decomposition",
    "kernels.scratch",
    "kernels.definite",
    "kernels.registers",
    "kernels.interleaved",
    "kernels.panels",
    "kernels.sweeps",
    "kernels.compiled",
    "kernels.launch",
    "kernels.gpu",
    "kernels.staging",
    "kernels",
    "array",
    "accessor",
    "job.guard",
    "job.metadata",
    "job.source",
    "job.plan",
    "job.ledger",
    "job.lock",
    "job.versions",
    "job.target",
    "job.tile",
    "job.proof",
    "job.worker_setup",
    "job.cluster",
    "job.window",
    "job.prepare",
    "job.report",
    "job.driver",
    "job.verify",
    "job.progress",
    "job",
    "",
    "cli",
]
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    for path in PACKAGE.rglob("*.py")
)


def imported(module):
    path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "dask_batchinv":
            base = node.module.removeprefix("dask_batchinv").lstrip(".")
            for name in node.names:
                inner = f"{base}.{name.name}".lstrip(".")
                yield inner if inner in MODULES else base


def test_every_module_has_its_place():
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    for other in imported(module):
        if (module, other) != ("cli", ""):
            assert ORDER.index(other) < ORDER.index(module), f"{module} imports {other}"


def test_public_names_are_all_and_documented():
    assert sorted(dask_batchinv.__all__) == dask_batchinv.__all__
    readme = (PACKAGE.parent / "README.md").read_text() if (PACKAGE.parent / "README.md").exists() else ""
    for name in dask_batchinv.__all__:
        thing = getattr(dask_batchinv, name)
        assert thing.__doc__, name
        assert not thing.__doc__.startswith(name + "("), f"{name} has only a generated docstring"
        assert f"`{name}" in readme or f"{name}(" in readme or f".{name}" in readme, f"README does not mention {name}"


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    found = importlib.import_module(f"dask_batchinv.{module}".rstrip("."))
    assert doctest.testmod(found, raise_on_error=False).failed == 0


def test_modules_are_all_importable_by_themselves():
    names = {name for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "dask_batchinv.")}
    assert names == {f"dask_batchinv.{module}" for module in MODULES if module}

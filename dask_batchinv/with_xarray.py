"""Xarray gets its accessors when it is imported, before or after this package: jobs may do without it."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register() -> None:
    """Register the accessors, now or as soon as Xarray is imported."""
    if "xarray" in sys.modules:
        _import_accessors()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _import_accessors() -> None:
    try:
        importlib.import_module("dask_batchinv.accessor")
    except Exception as error:  # Xarray itself can be used all the same
        with suppress(Warning):
            warnings.warn(f"Xarray objects have no .linalg of dask_batchinv: {error}", RuntimeWarning, stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds Xarray as the others do, and has something done once it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "xarray":
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Loads a module as another loader does, and then registers the accessors."""

    def __init__(self, loader: importlib.abc.Loader, finder: _Finder):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # what others may ask for resources
        self._loader.exec_module(module)
        with suppress(ValueError):  # another thread was first
            sys.meta_path.remove(self._finder)
        _import_accessors()

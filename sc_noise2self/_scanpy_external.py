"""Make the package reachable as `scanpy.external.n2s`, whichever of the two is imported first.

scanpy is not imported for it (that takes seconds): if `scanpy.external` is loaded already it gets the attribute now,
else when it is. `scanpy.external.n2s` and its submodules are this package's own modules, never second copies. A scanpy
without `scanpy.external` is left as it is, and so is a `scanpy.external.n2s` that somebody else put there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_HOST = "scanpy.external"
_ALIAS = f"{_HOST}.n2s"
_PACKAGE = __name__.rpartition(".")[0]


def attach() -> None:
    """Attach the package to `scanpy.external`, now or when that is imported; calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if _HOST in sys.modules:
        _set_alias(sys.modules[_HOST])


def _set_alias(host: ModuleType) -> None:
    package = sys.modules[_PACKAGE]
    if getattr(host, "n2s", package) is package and sys.modules.get(_ALIAS, package) is package:
        host.n2s = package  # type: ignore[attr-defined]
        sys.modules[_ALIAS] = package


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _HOST:
            spec = PathFinder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _HostLoader(spec.loader)
            return spec
        if fullname.startswith(f"{_ALIAS}.") and sys.modules.get(_ALIAS) is sys.modules[_PACKAGE]:
            return ModuleSpec(fullname, _AliasLoader(_PACKAGE + fullname.removeprefix(_ALIAS)))
        return None


class _HostLoader(Loader):
    """Loads `scanpy.external` as its own loader does, then attaches the package to it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _set_alias(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


class _AliasLoader(Loader):
    """Returns the package's own submodule under the alias, with its own name and spec."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec

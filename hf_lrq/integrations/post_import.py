"""Run something once a module that may never be imported has been imported: a finder on `sys.meta_path`.

The finder changes nothing about how modules are found or run. It counts how deep the imports of one package are nested
and acts when the outermost of them has finished. The end of the awaited module alone would be too early to import from
its siblings: transformers.quantizers, for example, is reached from the middle of transformers.modeling_utils.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader


class PostImportFinder:
    """Calls `action` after the first import that brings in `awaited`, then leaves `sys.meta_path`.

    Args:
        awaited: Full name of the module to wait for, for example `transformers.quantizers.auto`.
        action: Called without arguments in the importing thread, once no import of the same top-level package is under
            way in that thread. What it raises is raised by the import statement; the finder then stays, and the next
            import of a module of the package tries again.
    """

    def __init__(self, awaited: str, action: Callable[[], None]) -> None:
        self.awaited = awaited
        self.action = action
        self.key = (awaited, action.__module__, action.__qualname__)
        self._package = awaited.partition(".")[0]
        self._thread = threading.local()
        # Not its presence in sys.modules: another thread may be in the middle of running it.
        self.arrived = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What the other finders say about `name`, its loader wrapped when `name` belongs to the awaited package."""
        ours = name == self._package or name.startswith(self._package + ".")
        # A finder of another library may do as this one does and ask all the others, this one included.
        if not ours or getattr(self._thread, "asking", False):
            return None
        self._thread.asking = True
        try:
            spec = self._spec_of_others(name, path, target)
        finally:
            self._thread.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = cast("Loader", _CountingLoader(spec.loader, self))
        return spec

    def _spec_of_others(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None

    def entered(self) -> None:
        """An import of a module of the package begins in this thread."""
        self._thread.depth = getattr(self._thread, "depth", 0) + 1

    def left(self) -> None:
        """An import of a module of the package ends in this thread, well or not."""
        self._thread.depth -= 1

    def act_if_due(self) -> None:
        """Run the action when the awaited module is there and no import of its package is under way in this thread."""
        if self._thread.depth > 0 or not self.arrived:
            return
        # Counted like an import: those that the action makes are then no outermost ones, which would lead back here.
        self.entered()
        try:
            self.action()
        finally:
            self.left()
        # Another thread may have acted at the same moment; the action is idempotent, the removal must be too.
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)


class _CountingLoader:
    """Stands in for a module's loader until the module runs, and tells the finder when it has."""

    def __init__(self, loader: "Loader", finder: PostImportFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        # `importlib.util.find_spec` without an import hands out the stand-in: get_source, get_data, ... must work.
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Before the module's code runs: it may keep its spec, as the lazy modules of transformers do.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._finder.entered()
        try:
            self._loader.exec_module(module)
            if module.__name__ == self._finder.awaited:
                self._finder.arrived = True
        finally:
            self._finder.left()
        self._finder.act_if_due()


def after_import(awaited: str, action: Callable[[], None]) -> None:
    """Call `action()` now if the module `awaited` is imported, else right after the import that brings it in.

    Asking again for the same module and action changes nothing, even if a reload made a new function of the action.

    Args:
        awaited: Full module name.
        action: An idempotent function. What it raises comes out of this call, or of the import that led to it.
    """
    if awaited in sys.modules:
        action()
        return
    # By name, not by identity or class: those change when a module is reloaded.
    wanted = (awaited, action.__module__, action.__qualname__)
    if all(getattr(finder, "key", None) != wanted for finder in sys.meta_path):
        sys.meta_path.insert(0, PostImportFinder(awaited, action))

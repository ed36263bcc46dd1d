"""Imports hf_lrq right before a process imports transformers or PEFT, and nothing before that.

Stands alone: it is copied to where Python finds it at its start, and may outlive the package.
"""

import importlib
import sys


class Herald:
    """A finder that finds nothing by itself: it waits for a host of hf_lrq, and goes."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        """None, but for a host what the other finders say once hf_lrq is among them."""
        if name not in ("transformers", "peft"):
            return None
        sys.meta_path.remove(self)
        try:
            importlib.import_module("hf_lrq")
        except ModuleNotFoundError as error:
            # Another interpreter, or one from which the package is gone.
            if error.name != "hf_lrq":
                raise
        # Not None: the import that asks walks over a list that has just changed.
        for finder in list(sys.meta_path):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


if not any(type(finder).__name__ == "Herald" for finder in sys.meta_path) and "hf_lrq" not in sys.modules:
    sys.meta_path.insert(0, Herald())

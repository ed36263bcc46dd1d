"""For the child processes of `hf-lrq run`: Python imports this when it starts, as its folder is in PYTHONPATH."""

import importlib
import importlib.machinery
import importlib.util
import os
import sys

importlib.import_module("hf_lrq_autoload")

# The one that this one stands before, if there is one.
_here = os.path.dirname(os.path.abspath(__file__))
_others = [_place for _place in sys.path if os.path.abspath(_place) != _here]
_next = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _next is not None and _next.loader is not None:
    sys.modules["sitecustomize"] = importlib.util.module_from_spec(_next)
    _next.loader.exec_module(sys.modules["sitecustomize"])

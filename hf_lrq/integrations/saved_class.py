"""The class of which a checkpoint was saved, where another one loads it: what was in it must be in the files."""

import copy
from collections.abc import Collection
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_lrq.integrations.conversions import names_in_files, names_in_model
from hf_lrq.work import find_sites
from hf_lrq.work.sites import joined


def class_named_in(config: Any) -> Any:
    """The class of transformers that a model config names as its architecture; None if there is none for it."""
    for name in getattr(config, "architectures", None) or ():
        kind: Any = getattr(transformers, str(name), None)
        usable = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
        if usable and isinstance(config, getattr(kind, "config_class", None) or ()):
            return kind
    return None


def empty_model(kind: Any, config: Any) -> Any:
    """A model of this class without weights."""
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


class SavedModel:
    """What can be known of the model that was saved, from the one that is being loaded.

    Args:
        model: a PreTrainedModel, before its layers become compressed ones.
    """

    def __init__(self, model: Any):
        self.model = model
        self._same = type(model).__name__ in (model.config.architectures or ())
        self._other: Any = None

    @property
    def _saved(self) -> Any:
        """A model of the class that was saved, without weights; None if it cannot be told."""
        if self._same:
            return self.model
        if self._other is None:
            kind = class_named_in(self.model.config)
            self._other = False if kind is None else empty_model(kind, self.model.config)
        return self._other or None

    def stored_of(self, keys: Collection[str]) -> set[str]:
        """Which of these were saved; without a usable class all but those of heads, outside of the base model.

        Args:
            keys: full names of the weights of matrices, in the model that is being loaded.
        """
        if self._same:
            return set(keys)
        if self._saved is not None:
            found = names_in_files([joined(site.holder, "weight") for site in find_sites(self._saved)], self._saved)
            return set(keys) & set(names_in_model(found.values(), self.model, keys).values())
        return {key for key in keys if not self._outside(key)}

    def may_have(self, name: str) -> bool:
        """Whether a module of this name may have been in the saved model.

        Args:
            name: in the model that is being loaded, or that of the files where this one has no such module.
        """
        if _has(self.model, name):
            return True
        if self._saved is None:
            return self._outside(f"{name}.")
        prefix = self.model.base_model_prefix
        return any(_has(self._saved, each) for each in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")))

    def _outside(self, key: str) -> bool:
        prefix = self.model.base_model_prefix
        return _has(self.model, prefix) and not key.startswith(f"{prefix}.")


def _has(model: nn.Module, name: str) -> bool:
    """Whether there is a module of this name; the root does not count."""
    if not name:
        return False
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True

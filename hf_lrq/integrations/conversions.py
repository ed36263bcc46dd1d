"""Names in files against names in models: transformers renames and rearranges weights when it loads and saves them."""

import contextlib
from collections.abc import Collection, Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def names_in_model(names: Iterable[str], model: Any, wanted: Collection[str]) -> dict[str, str]:
    """Name of a tensor in files -> the name that the model will look for.

    Args:
        names: full names of tensors.
        model: a PreTrainedModel.
        wanted: names of the tensors of the model; they decide whether the prefix of the body is added or removed.
    """
    # Converters rearrange uncompressed weights; no compressed tensor goes through them.
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    known = dict.fromkeys(wanted, True)
    return {name: rename_source_key(name, renamings, [], model.base_model_prefix, known)[0] for name in names}


def names_in_files(names: Iterable[str], model: Any) -> dict[str, str]:
    """Name of a tensor in the model -> the name under which `save_pretrained` stores it."""
    renamings = [entry.reverse_transform() for entry in reversed(_used(model)) if isinstance(entry, WeightRenaming)]
    return {name: rename_source_key(name, renamings, [])[0] for name in names}


def names_of_kept(names: Collection[str], model: Any) -> dict[str, str]:
    """`names_in_files` of the tensors that `save_pretrained` stores as they are in the model."""
    reverses = _reverses(_used(model))
    return names_in_files([name for name in names if not _rearranged(name, reverses)], model)


def without_rearranging(conversions: Iterable[Any], keys: Collection[str]) -> list[Any]:
    """The conversions without those that would split, merge or permute one of the tensors `keys`.

    A weight may lie in pieces or in another order in files of the original model. That order means nothing to codes:
    compressed tensors are stored and loaded as they are in the model.
    """
    return [entry for entry in conversions if not _rearranges(entry, keys)]


def keep_arrangement(model: Any, keys: Collection[str]) -> None:
    """Keep `save_pretrained` from undoing, on the tensors `keys`, what loading did to the uncompressed weights."""
    used = _used(model)
    kept = without_rearranging(used, keys)
    if len(kept) < len(used):
        model._weight_conversions = kept


def _used(model: Any) -> list[Any]:
    """The conversions that `save_pretrained` will undo."""
    used = getattr(model, "_weight_conversions", None)
    if used is None:  # Not from `from_pretrained`.
        used = get_model_conversion_mapping(model, add_legacy=False)
        used = [entry for entry in used if type(entry).__name__ != "PrefixChange"]
    return list(used)


def _rearranges(entry: Any, keys: Collection[str]) -> bool:
    reverses = _reverses([entry])
    return any(_rearranged(key, reverses) for key in keys)


def _reverses(entries: Iterable[Any]) -> list[Any]:
    """What saving does to undo these converters."""
    found = []
    for entry in entries:
        if isinstance(entry, WeightConverter):
            # One without a way back does nothing on saving.
            with contextlib.suppress(NotImplementedError, ValueError):
                found.append(entry.reverse_transform())
    return found


def _rearranged(key: str, reverses: Iterable[Any]) -> bool:
    return any(reverse.rename_source_key(key)[1] is not None for reverse in reverses)

"""The repeated blocks of a model, found by structure: which modules are calibrated together, one group at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from hf_lrq.work import Site

_CONTAINERS = nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict  # Not callable.
# Rotary embeddings of these types rewrite their frequencies for each length they see.
_STATEFUL_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True, eq=False)
class Stack:
    """Blocks that follow each other, such as the layers of a decoder.

    Attributes:
        name: of the list that holds them.
        blocks: name -> module, in the order of the list; some may hold no site.
    """

    name: str
    blocks: dict[str, nn.Module]

    def block_of(self, module_name: str) -> str | None:
        """The block that the module called `module_name` lies in, if it is in one of this stack."""
        rest = module_name.removeprefix(f"{self.name}." if self.name else "")
        if rest == module_name and self.name:
            return None
        block = f"{self.name}.{rest.split('.')[0]}" if self.name else rest.split(".")[0]
        return block if block in self.blocks else None


def find_stacks(model: nn.Module, sites: Sequence[Site]) -> list[Stack]:
    """The outermost lists of like modules that contain sites, in the order of the model.

    A list counts when the members with sites inside are of few classes: at most half as many as members, so the
    alternating layers of a hybrid model count, and a pipeline of different stages does not. Members that are themselves
    sites are no blocks. Members of the same classes that hold no site belong to the stack: data flows through them.
    """
    names = {site.name for site in sites}
    return list(_stacks_below(model, "", names))


def _stacks_below(module: nn.Module, name: str, sites: set[str]) -> Iterator[Stack]:
    prefix = f"{name}." if name else ""
    if isinstance(module, nn.ModuleList | nn.Sequential):
        children = {f"{prefix}{key}": child for key, child in module.named_children()}
        owners = [
            child
            for path, child in children.items()
            if path not in sites
            and not isinstance(child, _CONTAINERS)
            and any(site.startswith(f"{path}.") for site in sites)
        ]
        kinds = {type(owner) for owner in owners}
        # One stage in a sequence is no repetition; one layer in a list is a model with one layer.
        enough = len(owners) > isinstance(module, nn.Sequential)
        if enough and len(kinds) <= max(1, len(owners) // 2):
            yield Stack(name, {path: child for path, child in children.items() if type(child) in kinds})
            return
    for key, child in module.named_children():
        yield from _stacks_below(child, f"{prefix}{key}", sites)


def is_stateful(model: nn.Module) -> bool:
    """Whether passes of the model must not overlap in time, because a pass changes something that others read."""
    for module in model.modules():
        if hasattr(module, "_hf_hook"):  # accelerate's: may move weights in and out.
            return True
        kinds = getattr(module, "rope_type", ())
        listed = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(mark in str(kind) for kind in listed for mark in _STATEFUL_ROPE):
            return True
    return False

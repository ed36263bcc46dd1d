"""What PEFT does to a model succeeds as a whole, or leaves the model as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_lrq.integrations.peft.merging import MergesIntoFactors


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """While it lasts, whatever is raised first puts back the modules, what is trained, and what is merged."""
    modules = dict(model.named_modules())
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    merges = [
        (module, module.get_base_layer().factors(), module.unmerged, list(module.merged_adapters))
        for module in modules.values()
        if isinstance(module, MergesIntoFactors)
    ]
    had_adapters = hasattr(model, "peft_config")
    try:
        yield
    except BaseException:
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if name and getattr(modules[parent], child, None) is not module:
                setattr(modules[parent], child, module)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for layer, factors, unmerged, merged in merges:
            layer.get_base_layer().restore(factors)
            layer.unmerged, layer.merged_adapters = unmerged, merged
        if hasattr(model, "peft_config") and not had_adapters:
            del model.peft_config
        raise

"""Every weight of a model, counted once: the matrices of sites, and what else there is, by kind."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from hf_lrq.work.sites import Site

SHOWN = 0.001  # Shares below it are told as one.


@dataclass(frozen=True)
class Census:
    """The weights of a model; tied ones count where they come first.

    Attributes:
        sites: label of each site -> its weights.
        others: kind of parameter -> weights.
    """

    sites: Mapping[str, int] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Weights of the whole model."""
        return sum(self.sites.values()) + sum(self.others.values())

    def left(self, compressed: Iterable[str], left_alone: Mapping[str, str]) -> dict[str, int]:
        """Reason or kind -> weights that are not compressed, the most first; with the compressed ones they are all.

        Args:
            compressed: labels of sites.
            left_alone: label of another site, or name of its module -> reason.
        """
        found = dict(self.others)
        for label in self.sites.keys() - set(compressed):
            reason = left_alone.get(label) or left_alone.get(label.rpartition(".")[0], "not compressed")
            found[reason] = found.get(reason, 0) + self.sites[label]
        return {reason: count for reason, count in sorted(found.items(), key=lambda item: (-item[1], item[0])) if count}


def shares(left: Mapping[str, int], total: int, shown: float = SHOWN) -> dict[str, float]:
    """Reason -> share of all weights of a model; what is below `shown` together, under its reasons.

    >>> shares({"embeddings": 30, "norms": 2, "biases": 1}, 100, shown=0.05)
    {'embeddings': 0.3, 'norms, biases': 0.03}
    """
    small = [reason for reason, weights in left.items() if weights < shown * total]
    found = {reason: weights / total for reason, weights in left.items() if reason not in small}
    return {**found, ", ".join(small): sum(left[reason] for reason in small) / total} if small else found


def take_census(model: nn.Module, sites: Iterable[Site]) -> Census:
    """Count the weights of an uncompressed model, which may be on the meta device, where none are tied yet.

    Args:
        model: that is counted.
        sites: all homes of matrices in it.
    """
    homes = {name: site for site in sites for name in (site.parameter, *site.aliases)}
    counts = {site.label: 0 for site in homes.values()}
    others: dict[str, int] = {}
    for name, parameter in _counted(model):
        site = homes.get(name)
        if site is not None:
            counts[site.label] = parameter.numel()
        else:
            kind = kind_of(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], parameter)
            others[kind] = others.get(kind, 0) + parameter.numel()
    return Census(counts, others)


def kind_of(module: nn.Module, name: str, parameter: Tensor) -> str:
    """What people call a parameter that is no matrix of a site.

    Args:
        module: that owns it.
        name: within the module.
        parameter: its value.
    """
    kind = type(module).__name__
    for classes, word in _KINDS:
        if isinstance(module, classes):
            return word
    if "norm" in kind.lower():
        return "norms"
    if "embedding" in kind.lower():
        return "embeddings"
    if name.endswith("bias"):
        return "biases"
    if parameter.ndim < 2:
        return "scales and other vectors"
    if isinstance(module, nn.Linear):
        return f"{kind}: computes more than a linear layer"
    return f"parameters of {kind}, which its own code uses"


_ATTENTION = "nn.MultiheadAttention: reads its weights itself"
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "embeddings"),
    (nn.modules.conv._ConvNd, "convolutions"),
    (nn.RNNBase, "recurrent layers"),
    ((nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear), _ATTENTION),
    (nn.Bilinear, "bilinear layers"),
    (ParametrizationList, "weights that are computed from others, as by weight norm"),
)


def _counted(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter by its first name; tied ones once, also while they are not tied yet."""
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    seen: set[int | str] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same = {id(parameter), tied.get(name, name)}
        if seen.isdisjoint(same):
            yield name, parameter
        seen |= same

"""Where matrices live in a model: how they are found, taken out as [out, in], and put back compressed.

Every way to compress (in memory, while a model is loaded, from files) and every reader of the result (loading, sizes)
asks a site for the names and shapes of what is stored. A new kind of home is one class here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_lrq.decomposition import CompressedMatrix, scale_problem
from hf_lrq.layout import LayerLayout, TensorLayout
from hf_lrq.nn import LRQExpertStack, LRQLinear, fused_experts
from hf_lrq.nn.fused_experts import PREFIX, add_stack, has_fused_experts, is_transposed, remove_stack, stack_names
from hf_lrq.work.plainness import bare, is_plain_linear


@dataclass(frozen=True)
class Site(ABC):
    """The home of one matrix, or of a stack of equal ones, in a model.

    Attributes:
        name: dotted name of the module that owns the uncompressed parameter.
        out_features, in_features: of each matrix.
        kind: word for reports.
        routed: whether a row of the module's input goes to some of the matrices only.
        of_tables: whether it is a table of tokens, an embedding or an output head: compressed without data, and counted
            apart from other layers.
    """

    name: str
    out_features: int
    in_features: int

    kind: ClassVar[str]
    routed: ClassVar[bool] = False
    of_tables: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def of(cls, name: str, module: nn.Module) -> "list[Site]":
        """The sites of this kind in the module called `name`; none if the module is of another kind."""

    @property
    def count(self) -> int:
        """The number of matrices."""
        return 1

    @property
    def weights(self) -> int:
        """The number of weights in all matrices."""
        return self.count * self.out_features * self.in_features

    @property
    def label(self) -> str:
        """The name by which patterns, plans and reports call it; unique in the model."""
        return self.name

    @property
    def parameter(self) -> str:
        """Full name of the uncompressed parameter."""
        return joined(self.name, "weight")

    @property
    def aliases(self) -> tuple[str, ...]:
        """Full names of parameters that are tied to the uncompressed one."""
        return ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that compute with the matrices."""
        return (self.name,)

    @property
    def holder(self) -> str:
        """Name of the module that holds the stored tensors, in memory and in files."""
        return self.name

    @property
    def matrices(self) -> tuple[str, ...]:
        """The name of each matrix."""
        return (self.label,)

    def obstacle(self, module: nn.Module) -> str | None:
        """Why the module cannot compute with compressed matrices, None if it can."""
        return None

    def scale_problem(self, parameter: Tensor) -> str | None:
        """Why the magnitude of its finite weights keeps a matrix from being compressed, None if it does not."""
        matrices = (self.matrix(parameter, index) for index in range(self.count))
        return next((problem for W in matrices if (problem := scale_problem(W)) is not None), None)

    def tensors(self, layout: LayerLayout) -> dict[str, TensorLayout]:
        """Full name -> layout of everything that is stored, bias excluded."""
        stored = layout.tensors(self.out_features, self.in_features)
        return {joined(self.holder, name): tensor for name, tensor in stored.items()}

    def bytes(self, layout: LayerLayout) -> int:
        """Bytes of everything that is stored, bias excluded."""
        return self.count * layout.bytes(self.out_features, self.in_features)

    @abstractmethod
    def matrix(self, parameter: Tensor, index: int) -> Tensor:
        """One matrix [out, in] of the uncompressed parameter."""

    def values(self, matrices: Sequence[CompressedMatrix]) -> dict[str, Tensor]:
        """Full name -> value of everything that is stored, see `tensors`."""
        (only,) = matrices
        return {joined(self.holder, name): tensor for name, tensor in only.tensors().items()}

    @abstractmethod
    def compressed(self, module: nn.Module, matrices: Sequence[CompressedMatrix]) -> nn.Module:
        """What takes the place of the uncompressed module: a layer of its own, or the module itself, changed."""

    @abstractmethod
    def empty(self, module: nn.Module, layout: LayerLayout, keep_parameter: bool) -> nn.Module:
        """Like `compressed`, with tensors that are still to be loaded, on the device of the uncompressed parameter.

        Args:
            module: the uncompressed one; its weights may be on the meta device.
            layout: of what will be loaded.
            keep_parameter: leave an uncompressed parameter under its name, to be loaded and then compressed.
        """

    def follow(self, model: nn.Module) -> Iterable[tuple[nn.Module, nn.Module]]:
        """Put modules that share what is stored in the place of those that are tied to the parameter: (old, new)."""
        return ()

    def unfollow(self, model: nn.Module) -> Iterable[tuple[nn.Module, nn.Module]]:
        """Undo `follow`, once the uncompressed module is back in the model: (old, new)."""
        return ()

    @abstractmethod
    def untouched(self, module: nn.Module, parameter: Tensor) -> nn.Module:
        """Undo `empty`: the uncompressed module around its uncompressed parameter."""

    @abstractmethod
    def uncompressed(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Undo `compressed`: the module with ordinary weights of `dtype`."""


@dataclass(frozen=True)
class LinearSite(Site):
    """A linear layer, y = x W^T + b.

    Attributes:
        template: the module without its parameters, where its class is a subclass of nn.Linear that computes the same.
        layer: class of the compressed layer.
    """

    template: nn.Module | None = field(default=None, compare=False, repr=False, kw_only=True)

    kind: ClassVar[str] = "linear"
    layer: ClassVar[type[LRQLinear]] = LRQLinear  # What it becomes.

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[Site]:
        """See `Site`."""
        if not is_plain_linear(module):
            return []
        template = None if type(module) is nn.Linear else bare(module)
        return [cls(name, module.out_features, module.in_features, template=template)]

    def matrix(self, parameter: Tensor, index: int) -> Tensor:
        """See `Site`."""
        return parameter

    def compressed(self, module: nn.Module, matrices: Sequence[CompressedMatrix]) -> nn.Module:
        """See `Site`."""
        bias: Tensor | None = getattr(module, "bias", None)
        return self.layer.from_matrix(matrices[0], bias)

    def empty(self, module: nn.Module, layout: LayerLayout, keep_parameter: bool) -> nn.Module:
        """See `Site`."""
        weight, bias = module.get_parameter("weight"), module._parameters["bias"]
        layer = self.layer(
            self.in_features,
            self.out_features,
            bias is not None,
            layout,
            device=weight.device,
            dtype=None if bias is None else bias.dtype,
        )
        if keep_parameter:
            layer.weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
            layer._is_hf_initialized = False  # A head that is not in the checkpoint is initialised as usual.
        return layer

    def untouched(self, module: nn.Module, parameter: Tensor) -> nn.Module:
        """See `Site`."""
        bias = module._parameters["bias"]
        plain = self._plain(bias is not None)
        plain.weight = nn.Parameter(parameter.detach())
        plain.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        return plain

    def uncompressed(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """See `Site`."""
        assert isinstance(module, LRQLinear), "that is what `compressed` makes"
        linear: nn.Module = module.to_linear(dtype).requires_grad_(True)
        if self.template is not None:
            plain = self._plain(linear.bias is not None)
            plain.weight, plain.bias = linear.weight, linear.bias
            linear = plain
        return linear.train(module.training)

    def _plain(self, bias: bool) -> nn.Module:
        """An uncompressed layer without its weights, or with those on the meta device."""
        if self.template is None:
            return nn.Linear(self.in_features, self.out_features, bias, device="meta")
        return bare(self.template)


@dataclass(frozen=True)
class Conv1DSite(LinearSite):
    """GPT-2's transposed linear layer, whose weight is stored [in, out]; recognised without importing its library.

    Attributes:
        original: its class, Conv1D(out_features, in_features).
    """

    original: type[nn.Module]

    kind: ClassVar[str] = "conv1d"

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[Site]:
        """See `Site`."""
        if type(module).__name__ != "Conv1D" or not (hasattr(module, "nf") and hasattr(module, "nx")):
            return []
        rows, columns = module.get_parameter("weight").shape
        return [cls(name, columns, rows, type(module))]

    def matrix(self, parameter: Tensor, index: int) -> Tensor:
        """See `Site`."""
        return parameter.T

    def uncompressed(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """See `Site`."""
        linear = super().uncompressed(module, dtype)
        transposed = self._plain(bias=True)
        transposed.weight = nn.Parameter(linear.get_parameter("weight").detach().T.contiguous())
        transposed.bias = linear.bias
        return transposed.train(module.training)

    def _plain(self, bias: bool) -> nn.Module:
        """See `LinearSite`; a Conv1D always has a bias."""
        with torch.device("meta"):
            return self.original(self.out_features, self.in_features)


@dataclass(frozen=True)
class ExpertStackSite(Site):
    """A stack of matrices [E, out, in] of a fused experts module, most of which have two.

    Attributes:
        stack: name of the parameter.
        experts: E.
        transposed: whether the parameter is [E, in, out].
    """

    stack: str
    experts: int
    transposed: bool = False

    kind: ClassVar[str] = "experts"
    routed: ClassVar[bool] = True

    @classmethod
    def of(cls, name: str, module: nn.Module) -> list[Site]:
        """See `Site`."""
        if not has_fused_experts(module):
            return []
        transposed = is_transposed(module)
        found: list[Site] = []
        for stack in stack_names(module):
            experts, rows, columns = module.get_parameter(stack).shape
            shape = (columns, rows) if transposed else (rows, columns)
            found.append(cls(name, *shape, stack, experts, transposed))
        return found

    @property
    def count(self) -> int:
        """See `Site`."""
        return self.experts

    @property
    def label(self) -> str:
        """See `Site`."""
        return joined(self.name, self.stack)

    @property
    def parameter(self) -> str:
        """See `Site`."""
        return self.label

    @property
    def holder(self) -> str:
        """See `Site`."""
        return joined(self.name, PREFIX + self.stack)

    @property
    def matrices(self) -> tuple[str, ...]:
        """See `Site`."""
        return tuple(f"{self.label}.{expert}" for expert in range(self.experts))

    def obstacle(self, module: nn.Module) -> str | None:
        """See `Site`."""
        return fused_experts.obstacle(module)

    def tensors(self, layout: LayerLayout) -> dict[str, TensorLayout]:
        """See `Site`."""
        each = super().tensors(layout)
        return {name: TensorLayout((self.experts, *one.shape), one.dtype) for name, one in each.items()}

    def matrix(self, parameter: Tensor, index: int) -> Tensor:
        """See `Site`."""
        return parameter[index].T if self.transposed else parameter[index]

    def values(self, matrices: Sequence[CompressedMatrix]) -> dict[str, Tensor]:
        """See `Site`."""
        each = [super(ExpertStackSite, self).values([one]) for one in matrices]
        return {name: torch.stack([one[name] for one in each]) for name in each[0]}

    def compressed(self, module: nn.Module, matrices: Sequence[CompressedMatrix]) -> nn.Module:
        """See `Site`."""
        self.empty(module, matrices[0].layout, keep_parameter=False)
        stack: Any = module._modules[PREFIX + self.stack]
        for expert, matrix in enumerate(matrices):
            stack.load_matrix(expert, matrix)
        return module

    def empty(self, module: nn.Module, layout: LayerLayout, keep_parameter: bool) -> nn.Module:
        """See `Site`."""
        device = module.get_parameter(self.stack).device
        stack = LRQExpertStack(self.experts, self.in_features, self.out_features, layout, device, self.transposed)
        add_stack(module, self.stack, stack)
        if not keep_parameter:
            delattr(module, self.stack)
        return module

    def untouched(self, module: nn.Module, parameter: Tensor) -> nn.Module:
        """See `Site`."""
        remove_stack(module, self.stack, parameter.detach())
        return module

    def uncompressed(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """See `Site`."""
        stack: Any = module._modules[PREFIX + self.stack]
        dense = stack.dense(dtype)
        remove_stack(module, self.stack, dense.transpose(1, 2).contiguous() if self.transposed else dense)
        return module


SITE_KINDS: tuple[type[Site], ...] = (LinearSite, Conv1DSite, ExpertStackSite)


def sites_of(name: str, module: nn.Module) -> list[Site]:
    """The homes of matrices in one uncompressed module; for most modules there are none."""
    if isinstance(module, LRQLinear | LRQExpertStack):
        return []
    return [site for kind in SITE_KINDS for site in kind.of(name, module)]


def find_sites(model: nn.Module) -> list[Site]:
    """The homes of all matrices of a model that are not compressed yet, in the order of its modules."""
    return [site for name, module in model.named_modules() for site in sites_of(name, module)]


def joined(name: str, child: str) -> str:
    """The dotted name of a child; the root of a model has the empty name."""
    return f"{name}.{child}" if name else child

"""The tensors of a compressed model that a recovery trains: in float32 while it lasts, afterwards as they are stored.

Compressed layers take float32 beside activations of any dtype. Other modules do not: they keep the dtype they have, and
what is trained is a float32 master of each parameter, which it is rounded from before every pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_lrq.errors import RecoveryError
from hf_lrq.nn import LRQExpertStack, LRQHead, LRQLinear
from hf_lrq.nn.stored import StoredFactors
from hf_lrq.recovery.factors import Compressed, store_factors, with_float_factors

State = list[Tensor]

# Kind -> attributes of a compressed module.
VECTORS = {"scales": ("scales",), "rotations": ("rot_in", "rot_out"), "biases": ("bias",)}
PAIRS = (("lr_L", "lr_R"), ("ft_L", "ft_R"))


@dataclass(eq=False)
class Slot:
    """One tensor that is trained.

    Attributes:
        parameter: the parameter of the module, which the forward pass sees.
        original: the tensor that it had before.
        master: what the optimizer trains, float32; the parameter itself where that is float32 while it is trained.
    """

    parameter: nn.Parameter
    original: Tensor
    master: nn.Parameter

    def lift_gradient(self) -> None:
        """Move the gradient to the master."""
        if self.master is not self.parameter and self.parameter.grad is not None:
            self.master.grad, self.parameter.grad = self.parameter.grad.float(), None

    def show_master(self) -> None:
        """Let the forward pass see the master, in the dtype of the parameter."""
        if self.master is not self.parameter:
            self.parameter.data.copy_(self.master.data)

    def round(self) -> None:
        """Round the parameter to the dtype it had.

        Raises:
            FloatingPointError: if that cannot hold it.
        """
        rounded = self.master.data.to(self.original.dtype)
        if not rounded.isfinite().all():
            raise FloatingPointError(f"a trained tensor is beyond the range of {self.original.dtype}.")
        self.parameter.data = rounded


@dataclass(eq=False)
class Trainable:
    """What is trained of one model; `open` it, train, then `store` or `undo`, and `close` it.

    Attributes:
        model: the compressed model.
        kinds: which of `options.KINDS` are trained.
        pairs: (L, R) slots.
        vectors: slots of everything else.
        in_place: slots that are rounded where they are; the others are factors of a layer, which are stored as pairs.
        layers: layers, and stacks whose factors are codes, that are trained -> the factors they had before.
        refitted: layers whose factors were put back to codes.
    """

    model: nn.Module
    kinds: tuple[str, ...]
    pairs: list[tuple[Slot, Slot]] = field(default_factory=list)
    vectors: list[Slot] = field(default_factory=list)
    in_place: list[Slot] = field(default_factory=list)
    layers: dict[Compressed, StoredFactors] = field(default_factory=dict)
    refitted: int = 0
    _flags: list[tuple[nn.Parameter, bool]] = field(default_factory=list)

    def open(self) -> None:
        """Make float32 of what is trained and freeze everything else.

        Raises:
            RecoveryError: if there is nothing to train.
        """
        self._flags = [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.requires_grad_(False)
        try:
            for module in list(self.model.modules()):
                if isinstance(module, LRQHead) and module.shares:
                    continue  # Its scales are those of the embedding, too.
                if isinstance(module, LRQLinear | LRQExpertStack):
                    self._open_compressed(module)
                elif "norms" in self.kinds and is_norm(module):
                    self.vectors += [master_of(p) for p in module.parameters(recurse=False) if p.is_floating_point()]
            self.in_place += self.vectors
            if not self.pairs and not self.vectors:
                raise RecoveryError(
                    f"{type(self.model).__name__} has nothing to train of the kinds {', '.join(self.kinds)}. "
                    "Compress it first, or name other kinds."
                )
        except BaseException:
            self.undo()
            self.close()
            raise

    def _open_compressed(self, module: Compressed) -> None:
        if "factors" in self.kinds:
            before = module.factors()
            # Float factors of a stack are rounded where they are.
            if before.rank and (isinstance(module, LRQLinear) or before.are_codes):
                self.layers[module] = before
                with_float_factors(module)
            for left, right in PAIRS:
                L, R = getattr(module, left), getattr(module, right)
                if L is not None and L.is_floating_point():
                    self.pairs.append((slot_of(L), slot_of(R)))
                    if module not in self.layers or (isinstance(module, LRQExpertStack) and left == "ft_L"):
                        self.in_place += self.pairs[-1]
        for kind, attributes in VECTORS.items():
            tensors = [getattr(module, attribute, None) for attribute in attributes if kind in self.kinds]
            self.vectors += [slot_of(p) for p in tensors if p is not None]

    def slots(self) -> Iterator[Slot]:
        """All slots."""
        for L, R in self.pairs:
            yield L
            yield R
        yield from self.vectors

    def state(self) -> State:
        """A copy of all values, on the CPU."""
        return [slot.master.detach().to("cpu", copy=True) for slot in self.slots()]

    def load(self, state: State) -> None:
        """Put values back that `state` returned."""
        for slot, values in zip(self.slots(), state, strict=True):
            slot.master.data.copy_(values)
            slot.show_master()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """After a backward pass: one step of the masters, which the next pass sees."""
        for slot in self.slots():
            slot.lift_gradient()
        optimizer.step()
        optimizer.zero_grad()
        for slot in self.slots():
            slot.show_master()

    @torch.no_grad()
    def store(self, generator: torch.Generator) -> None:
        """Make everything what a checkpoint can hold: float16, and codes where factors were codes.

        Args:
            generator: randomness for the decomposition of large layers.

        Raises:
            FloatingPointError: if something is beyond the range of its dtype.
        """
        for slot in self.in_place:
            slot.round()
        for layer, before in self.layers.items():
            store_factors(layer, before, generator)
            self.refitted += before.are_codes * (layer.experts if isinstance(layer, LRQExpertStack) else 1)

    def restore_codes(self) -> None:
        """After `store`: give factors that are codes those they had before, beside everything else that was trained."""
        for layer, before in self.layers.items():
            if before.are_codes:
                layer.restore(before)
        self.refitted = 0

    def undo(self) -> None:
        """Give the model back every tensor that it had."""
        for slot in self.slots():
            slot.parameter.data = slot.original
        for layer, before in self.layers.items():
            layer.restore(before)
        self.refitted = 0

    def close(self) -> None:
        """Give every parameter back its own `requires_grad`; new ones are frozen, as compressed layers are."""
        self.model.requires_grad_(False)
        for p, flag in self._flags:
            if p.is_floating_point():
                p.requires_grad_(flag)
        for p in self.model.parameters():
            p.grad = None


def slot_of(parameter: nn.Parameter) -> Slot:
    """The parameter of a compressed module, turned to a float32 copy of itself that requires a gradient."""
    original = parameter.data
    parameter.data = original.float().clone()
    parameter.requires_grad_(True)
    return Slot(parameter, original, parameter)


def master_of(parameter: nn.Parameter) -> Slot:
    """Any other parameter: it stays in its dtype, requires a gradient, and gets a float32 master if it has less."""
    if parameter.dtype == torch.float32:
        return slot_of(parameter)
    original = parameter.data
    parameter.data = original.clone()
    parameter.requires_grad_(True)
    return Slot(parameter, original, nn.Parameter(original.float().clone()))


def is_norm(module: nn.Module) -> bool:
    """Whether the module is some LayerNorm or RMSNorm: architectures have classes of their own, named alike."""
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None

"""Subclasses of nn.Linear: those that compute x W^T + b are compressed, and come back as what they were."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lrq.nn import LRQLinear
from hf_lrq.spec import CompressionSpec
from hf_lrq.work import Inline, ModelSink, ModelSource, compress_sites, find_sites, make_plan
from hf_lrq.work.plainness import is_plain_linear


class Inherited(nn.Linear):
    """Differs in how it is made only."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init: str = "default"):
        super().__init__(in_features, out_features, bias)
        self.init = init


class Spelled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.01


class Clipped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-100, 100))


class Ternary(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.sign(), self.bias)


class OnlyInTraining(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + float(self.training)


class Widening(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class WithState(nn.Linear):
    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("largest", torch.tensor(float("inf")))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(max=self.largest)


class Router(nn.Linear):
    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(input)
        return y, y.softmax(-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (nn.Linear, True),
        (Inherited, True),
        (Spelled, True),
        *((kind, False) for kind in (Scaled, Clipped, Ternary, OnlyInTraining, Widening, WithState, Router)),
    ],
)
def test_what_counts_is_what_it_computes(kind: type[nn.Linear], expected: bool, device: str, bias: bool) -> None:
    with torch.device(device):
        layer = kind(48, 32, bias=bias)
    before = dict(vars(layer))
    assert is_plain_linear(layer) is expected
    assert vars(layer) == before


def test_layers_whose_weights_torch_reads_or_makes_are_not_taken() -> None:
    assert not is_plain_linear(nn.MultiheadAttention(32, 4).out_proj)
    assert not is_plain_linear(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))


@pytest.mark.parametrize("make", [lambda: Inherited(32, 24, init="odd"), lambda: Spelled(32, 24, bias=False)])
def test_uncompressing_gives_the_original_class_back(
    make: Callable[[], nn.Linear], spec: CompressionSpec, generator: torch.Generator
) -> None:
    model = nn.Sequential(make())
    original = model[0]
    (site,) = find_sites(model)
    compress_sites(
        make_plan(model, spec),
        [site],
        ModelSource(model),
        ModelSink(model, dict.fromkeys(model.modules(), False)),
        Inline(),
    )
    layer = model[0]
    assert isinstance(layer, LRQLinear)
    plain = site.uncompressed(layer, torch.float32)
    assert type(plain) is type(original)
    assert plain.extra_repr() == original.extra_repr()
    assert getattr(plain, "init", None) == getattr(original, "init", None)
    x = torch.randn(3, 32, generator=generator)
    assert torch.equal(plain(x), F.linear(x, layer.dense(), original.bias))
    assert set(plain.state_dict()) == set(original.state_dict())

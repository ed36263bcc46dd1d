"""Stand-ins for stacks of experts: products are computed, anything else is an error; gradients are those of weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_lrq.errors import CompressionError
from hf_lrq.nn.expert_weights import ExpertWeights
from hf_lrq.nn.fused_experts import has_fused_experts, is_transposed, obstacle, with_products


def stand_in(W: Tensor, transposed: bool) -> ExpertWeights:
    product = lambda x, expert: x @ (W[expert] if transposed else W[expert].T)  # noqa: E731
    return ExpertWeights(product, W.shape, transposed, W.device)


def test_products_are_those_of_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(3, 5, 7, generator=generator), torch.randn(4, 7, generator=generator)
    b = torch.randn(5, generator=generator)
    torch.testing.assert_close(F.linear(x, stand_in(W, False)[torch.tensor(1)]), F.linear(x, W[1]))
    torch.testing.assert_close(F.linear(x, stand_in(W, False)[2], b), F.linear(x, W[2], b))
    torch.testing.assert_close(F.linear(x, stand_in(W, False)[2], bias=b), F.linear(x, W[2], b))
    y = torch.randn(4, 5, generator=generator)
    for multiply in (torch.matmul, torch.mm, lambda a, b: a @ b):
        torch.testing.assert_close(multiply(y, stand_in(W, True)[1]), y @ W[1])
    assert stand_in(W, True).shape[0] == 3


@pytest.mark.parametrize("requires_grad", [False, True])
def test_rows_of_zeros_give_zeros_and_their_gradient(requires_grad: bool) -> None:
    W = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    x[0, 1], x[2] = 0, 0
    mine, theirs = (x.clone().requires_grad_(requires_grad) for _ in range(2))
    found, expected = torch.bmm(mine, stand_in(W, True)), torch.bmm(theirs, W)
    torch.testing.assert_close(found, expected)
    if requires_grad:
        found.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_what_is_no_product_is_an_error() -> None:
    W = torch.ones(2, 3, 3)
    for transposed, use in [
        (False, lambda W: torch.zeros(1, 3) @ W[0]),
        (True, lambda W: F.linear(torch.zeros(1, 3), W[0])),
        (False, lambda W: torch.bmm(torch.zeros(2, 1, 3), W)),
        (True, lambda W: torch.add(torch.zeros(3, 3), W[0])),
    ]:
        with pytest.raises(CompressionError, match="is no product with the matrix of an expert"):
            use(stand_in(W, transposed))
    with pytest.raises(CompressionError, match="a part of the matrix"):
        stand_in(W, False)[0][1]


class Experts(nn.Module):
    """Two stacks, used as the code of `way` says."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        shapes = {"bmm": ((2, 4, 12), (2, 6, 4))}.get(way, ((2, 12, 4), (2, 4, 6)))
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "bmm":
            gate, up = torch.bmm(x.view(2, -1, 4), self.gate_up_proj).chunk(2, -1)
            return torch.bmm(gate * up, self.down_proj).view(-1, 4)
        W = self.gate_up_proj * 2 if self.way == "scaled" else self.gate_up_proj
        gate, up = F.linear(x, W[0]).chunk(2, -1)
        return F.linear(gate * up, self.down_proj[0]) if self.way != "half" else gate[:, :4]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("way", "fits"), [("bmm", True), ("linear", True), ("scaled", False), ("half", False)])
def test_code_that_wants_more_than_products_is_found_by_a_trial(way: str, fits: bool, device: str) -> None:
    module = Experts(way).to(device)
    assert has_fused_experts(module)
    assert is_transposed(module) is (way == "bmm")
    problem = "Experts uses its experts in other ways than products with their matrices"
    assert obstacle(module) == (None if fits else problem)
    assert type(module) is Experts


def test_a_copy_with_products_leaves_the_module_as_it_was() -> None:
    module = Experts("linear")
    clone = with_products(module, {"gate_up_proj": lambda x, _: x.new_ones(len(x), 12)})
    x = torch.randn(3, 4)
    torch.testing.assert_close(clone.forward(x), F.linear(torch.ones(3, 6), module.down_proj[0]))
    assert clone.down_proj is module.down_proj
    assert isinstance(module.gate_up_proj, nn.Parameter)

"""What is compressed and what not, as it is told to people."""

import pytest
import torch
from torch import nn

from hf_lrq.errors import CompressionError
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work import find_sites
from hf_lrq.work.census import take_census
from hf_lrq.work.plan import excluded, make_plan


def test_a_model_without_linear_layers_is_not_told_to_lower_the_rank() -> None:
    with pytest.raises(CompressionError, match=r"Sequential has no layer to compress: none is linear\.$"):
        make_plan(nn.Sequential(nn.Conv2d(3, 3, 1)), CompressionSpec())


def test_reasons_are_given_once_with_the_first_names() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    spec = CompressionSpec(default=LayerSpec(rank=64))
    with pytest.raises(CompressionError) as caught:
        make_plan(model, spec, excluded(model, ["5"]))
    message = str(caught.value)
    assert "6 linear layers found, all skipped" in message
    assert "0, 1, 2 and 2 more: would not get smaller with this rank and these bits" in message
    assert "5: matches '5' in modules_to_not_convert" in message
    assert message.endswith("Lower the rank, or shorten modules_to_not_convert.")


@pytest.mark.parametrize("order", [("head", "table"), ("table", "head")])
@pytest.mark.parametrize("tied_already", [False, True])
def test_tied_weights_count_once_also_before_they_are_tied(order: tuple[str, str], tied_already: bool) -> None:
    model = nn.Module()
    for name in order:
        model.add_module(name, nn.Linear(8, 4, bias=False, device="meta"))
    model.add_module("other", nn.Linear(8, 4, bias=False, device="meta"))
    model.all_tied_weights_keys = {"head.weight": "table.weight"}  # type: ignore[assignment]
    if tied_already:
        model.head.weight = model.table.weight  # type: ignore[union-attr]
    assert take_census(model, find_sites(model)).total == 2 * 32
    assert take_census(nn.Linear(8, 4, device=torch.device("cpu")), []).total == 36


def test_each_site_is_planned_or_left_alone_with_a_reason(homes: nn.Module, spec: CompressionSpec) -> None:
    plan = make_plan(homes, spec, {"linear": "for a test"})
    assert [site.label for site in plan.specs] == ["inner.0", "experts.gate_up_proj", "experts.down_proj"]
    assert plan.left_alone == {"linear": "for a test"}
    assert plan.matrices == ["inner.0", *(f"experts.{s}_proj.{e}" for s in ("gate_up", "down") for e in range(3))]
    inventory = plan.inventory
    assert inventory.compressed_parameters == 24 * 32 + 3 * (32 * 32 + 32 * 16)
    assert "3 matrices with 5,376 of" in inventory.summary()
    assert inventory.report().skipped == plan.left_alone


def test_experts_are_compressed_whole_or_not_at_all(homes: nn.Module, spec: CompressionSpec) -> None:
    class ScaledExperts(type(homes.experts)):  # type: ignore[misc]
        _apply_gate = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (2 * self.gate_up_proj[0]).T

    homes.experts.__class__ = ScaledExperts
    reason = "ScaledExperts uses its experts in other ways than products with their matrices"
    assert make_plan(homes, spec).left_alone == dict.fromkeys(["experts.gate_up_proj", "experts.down_proj"], reason)


def test_a_module_in_a_plain_list_is_left_alone(spec: CompressionSpec) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(32, 32) for _ in range(3))
            self.stages = [self.first]
            self.by_name = {"second": self.second}

    plan = make_plan(nn.Sequential(Holder()), spec)
    assert [site.label for site in plan.specs] == ["0.third"]
    assert plan.left_alone == {
        "0.first": "also held by Holder.stages, where it cannot be replaced",
        "0.second": "also held by Holder.by_name, where it cannot be replaced",
    }

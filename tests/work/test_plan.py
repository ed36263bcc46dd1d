"""What is compressed and what not, as it is told to people."""

import pytest
import torch
from torch import nn

from hf_lrq.errors import CompressionError
from hf_lrq.spec import CompressionSpec, LayerSpec
from hf_lrq.work.plan import count_parameters, excluded, make_plan


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
    assert count_parameters(model) == 2 * 32
    assert count_parameters(nn.Linear(8, 4, device=torch.device("cpu"))) == 36

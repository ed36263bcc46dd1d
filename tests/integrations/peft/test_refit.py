"""After a merge: fewer ranks, or codes again, with what that costs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_lrq
from hf_lrq.nn import LRQLinear

# Releases of PEFT and transformers warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def layers(model: Any) -> dict[str, LRQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LRQLinear)}


@pytest.mark.parametrize("factor_bits", [16, 8])
def test_merged_ranks_shrink_to_the_best_approximation(base: Any, trained: Any, factor_bits: int) -> None:
    merged = trained(base(factor_bits), "append:3").merge_and_unload()
    products = {name: layer.low_rank() for name, layer in layers(merged).items()}
    records = hf_lrq.refit_factors(merged, rank=5)
    assert [record.name for record in records] == list(products)
    for record in records:
        layer, (L, R) = layers(merged)[record.name], products[record.name]
        assert (record.rank_before, record.rank, layer.rank, layer.ft_rank) == (7, 5, 5, 0)
        product = L.float() @ R.float()
        expected = torch.linalg.svdvals(product)[5:].square().sum().sqrt() / torch.linalg.matrix_norm(product)
        assert record.relative_error == pytest.approx(expected.item(), rel=0.01, abs=1e-3)  # Float16.


@pytest.mark.parametrize(("bits", "cost"), [(8, 0.02), (4, 0.25)])
def test_merged_factors_become_codes_again(
    base: Any, trained: Any, logits: Any, tmp_path: Path, bits: int, cost: float
) -> None:
    merged = trained(base(bits), "all").merge_and_unload()
    before = logits(merged)
    codes = {name: layer.weight.clone() for name, layer in layers(merged).items()}
    records = hf_lrq.refit_factors(merged, factor_bits=bits)
    assert all(0 < record.relative_error < cost for record in records)
    assert all(layer.factors().are_codes for layer in layers(merged).values())
    assert all(torch.equal(layer.weight, codes[name]) for name, layer in layers(merged).items())
    after = logits(merged)
    assert (after - before).norm() < cost * before.norm()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), after)


def test_enough_ranks_cost_nothing(base: Any, logits: Any) -> None:
    model = base()
    before = logits(model)
    assert max(record.relative_error for record in hf_lrq.refit_factors(model, rank=10**6)) < 1e-3
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("options", "message"), [({"rank": 0}, "at least 1"), ({"factor_bits": 2}, "one of 4, 8, 16")])
def test_what_cannot_be_stored_is_refused(base: Any, options: Any, message: str) -> None:
    with pytest.raises(hf_lrq.SpecError, match=message):
        hf_lrq.refit_factors(base(), **options)

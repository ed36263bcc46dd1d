"""Batches whose rows are for different adapters: every row is what its adapter alone makes of it."""

import itertools
from typing import Any

import pytest
import torch
from peft import get_peft_model

from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft import LRQAdapterConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NAMES = ["a", "__base__", "b", "a"]
ROWS = torch.randint(0, 128, (4, 6), generator=torch.Generator().manual_seed(3))


def two(model: Any, first: str = "all", second: str = "append:2", **options: Any) -> Any:
    """A model with adapters a and b; b is for one kind of layer only."""
    model = get_peft_model(model, LRQAdapterConfig(mode=first, init="random", seed=1, **options), adapter_name="a")
    model.add_adapter("b", LRQAdapterConfig(mode=second, init="random", seed=2, target_modules=["up_proj"], **options))
    return model.eval()


def one_by_one(model: Any, names: list[str]) -> torch.Tensor:
    rows = []
    for name, row in zip(names, ROWS, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(row[None]).logits)
        else:
            model.set_adapter(name)
            rows.append(model(row[None]).logits)
    model.set_adapter("a")
    return torch.cat(rows)


@pytest.mark.parametrize(("first", "second"), [("all", "append:2"), ("append:3", "core:full"), ("spectral", "head:1")])
@torch.no_grad()
def test_every_row_is_what_its_adapter_alone_makes_of_it(base: Any, first: str, second: str) -> None:
    model = two(base(), first, second)
    expected = one_by_one(model, NAMES)
    others = [one_by_one(model, [name] * 4) for name in ("a", "b", "__base__")]
    assert all((x - y).abs().max() > 1e-4 for x, y in itertools.combinations(others, 2))
    torch.testing.assert_close(model(ROWS, adapter_names=NAMES).logits, expected, rtol=0, atol=1e-6)
    # And only for that call.
    torch.testing.assert_close(model(ROWS).logits, one_by_one(model, ["a"] * 4), rtol=0, atol=1e-6)


@torch.no_grad()
def test_modules_that_are_trained_whole_follow(base: Any) -> None:
    model = two(base(), modules_to_save=["lm_head"])
    for name, scale in (("a", 2.0), ("b", 3.0)):
        model.get_base_model().lm_head.modules_to_save[name].weight.mul_(scale)
    torch.testing.assert_close(model(ROWS, adapter_names=NAMES).logits, one_by_one(model, NAMES), rtol=0, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_are_generated_by_their_own_adapters(base: Any, beams: int) -> None:
    model = two(base())
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    found = model.generate(input_ids=ROWS[:2], adapter_names=["b", "__base__"], **options)
    with model.disable_adapter():
        second = model.generate(input_ids=ROWS[1:2], **options)
    model.set_adapter("b")
    first = model.generate(input_ids=ROWS[:1], **options)
    assert torch.equal(found, torch.cat([first, second]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "c", "a"], r"There is no adapter 'c'\. Adapters: a, b; '__base__' is none"),
        (["a", "b"], "adapter_names has 2 names, and a layer got 4 rows"),
        ("a", "adapter_names must be a list of names, one for each row of the batch; got 'a'"),
    ],
)
def test_names_that_do_not_fit_are_refused(base: Any, names: Any, message: str) -> None:
    model = two(base())
    with pytest.raises(SpecError, match=message):
        model(ROWS, adapter_names=names)
    model(ROWS)  # Nothing is left behind.


def test_a_model_that_trains_or_is_merged_refuses_them(base: Any) -> None:
    model = two(base())
    model.merge_adapter()
    with pytest.raises(SpecError, match=r"adapters are merged into the layers\. Call unmerge_adapter"):
        model(ROWS, adapter_names=NAMES)
    model.unmerge_adapter()
    with pytest.raises(SpecError, match=r"the model is in training mode\. Call model\.eval"):
        model.train()(ROWS, adapter_names=NAMES)

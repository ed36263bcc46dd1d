"""A mode that somebody else registers is as good as one of ours."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from hf_lrq.errors import SpecError
from hf_lrq.integrations.peft import LRQAdapterConfig, modes
from hf_lrq.integrations.peft.modes import All, Head, Mode, known_modes, parse_mode, register_mode

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@dataclass(frozen=True)
class Left(Mode):
    """Trains an addition to the first columns of L."""

    def trained(self, L: Tensor, R: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"lrq_U": L.new_zeros(L[:, : self.number].shape, dtype=torch.float32)}

    def product(self, L: Tensor, R: Tensor, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        added = own["lrq_U"]
        return L + torch.nn.functional.pad(added, (0, L.shape[1] - added.shape[1])), R


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(modes, "_MODES", dict(modes._MODES))
    register_mode("left", Left, number="may")


@pytest.mark.parametrize("factor_bits", [16, 4])
@pytest.mark.parametrize("text", ["left", "left:2"])
def test_it_starts_at_the_base_model_trains_saves_and_merges(
    base: Any, logits: Any, adapted: Any, tokens: Tensor, tmp_path: Path, text: str, factor_bits: int
) -> None:
    plain = base(factor_bits)
    expected = logits(plain)
    model = adapted(plain, text)
    assert torch.equal(logits(model), expected)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(factor_bits), tmp_path)), trained)
    merged = logits(model.merge_and_unload())
    assert (merged - trained).abs().max() < 0.02 * (trained - expected).abs().max()


def test_its_number_of_ranks_can_differ_by_module(base: Any, adapted: Any) -> None:
    model = adapted(base(), "left:2", rank_pattern={"up_proj": 3})
    shapes = {name.split(".")[-3]: p.shape[1] for name, p in model.named_parameters() if ".lrq_U." in name}
    assert shapes["up_proj"] == 3
    assert {shape for name, shape in shapes.items() if name != "up_proj"} == {2}


def test_it_is_named_among_the_others() -> None:
    assert known_modes()["left"] == "may"
    assert parse_mode("left:3") == Left(3)
    with pytest.raises(
        SpecError, match=r"Unknown mode 'lefd'\. Did you mean 'left'\? Modes: all, .*, left or left:k\."
    ):
        LRQAdapterConfig(mode="lefd")


def test_names_and_classes_are_registered_once() -> None:
    register_mode("left", Left, number="may")
    for name, kind in (("all", Left), ("left", All), ("right", Head)):
        with pytest.raises(SpecError, match=r"mode '\w+' is \w+ already\. Choose another name, or another class\."):
            register_mode(name, kind)
    with pytest.raises(SpecError, match="number must be one of 'no', 'may', 'must', got 'yes'"):
        register_mode("right", Left, number="yes")


def test_a_name_may_have_a_colon() -> None:
    @dataclass(frozen=True)
    class Other(Left):
        pass

    register_mode("left:other", Other, number="must")
    assert parse_mode("left:other:3") == Other(3)
    assert parse_mode("left:3") == Left(3)
    with pytest.raises(SpecError, match="mode 'left:other' needs a number of ranks, as in 'left:other:8'"):
        parse_mode("left:other")

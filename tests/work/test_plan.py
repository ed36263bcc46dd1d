"""What is compressed and what not, as it is told to people."""

import pytest
import torch
import transformers
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


def on_meta(**shape: int) -> nn.Module:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1, vocab_size=32, **shape))


@pytest.mark.parametrize(
    ("shape", "expected", "with_rank_64"),
    [
        # Of SmolLM2-135M, Qwen2.5-0.5B and Llama-3.2-1B.
        ((576, 1536, 9, 3), 2.387, 5.153),
        ((896, 4864, 14, 2), 2.293, 3.612),
        ((2048, 8192, 32, 8), 2.291, 2.759),
    ],
)
def test_two_bits_are_about_two_bits_by_default(
    shape: tuple[int, int, int, int], expected: float, with_rank_64: float
) -> None:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    model = on_meta(**dict(zip(names, shape, strict=True)))

    def bits(spec: LayerSpec) -> float:
        layouts = make_plan(model, CompressionSpec(default=spec), {"lm_head": "head"}).inventory.layouts
        return 8 * sum(site.bytes(layout) for site, layout in layouts.items()) / sum(site.weights for site in layouts)

    assert bits(LayerSpec()) == pytest.approx(expected, abs=1e-3)
    assert bits(LayerSpec(rank=64, factor_bits=16)) == pytest.approx(with_rank_64, abs=1e-3)
    assert bits(LayerSpec()) - bits(LayerSpec(rank=0)) <= 0.3


def test_layers_that_are_computed_together_get_one_codebook_and_one_rank() -> None:
    """So that one launch computes them: k and v, which alone would be e8p of rank 2, follow q."""
    model = on_meta(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=1)
    plan = make_plan(model, CompressionSpec(), {"lm_head": "head"})
    chosen = {site.name.rpartition(".")[2]: (spec.codebook, spec.rank) for site, spec in plan.specs.items()}
    assert chosen == {
        **dict.fromkeys(["q_proj", "k_proj", "v_proj"], ("bt", 5)),
        **dict.fromkeys(["gate_proj", "up_proj"], ("bt", 8)),
        **{"o_proj": ("bt", 8), "down_proj": ("bt", 8)},
    }
    alone = LayerSpec().fitted((64, 512))
    assert (alone.codebook, alone.rank) == ("e8p", 2)


def test_what_a_pattern_changes_is_on_its_own() -> None:
    model = on_meta(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=1)
    spec = CompressionSpec(patterns={"q_proj": {"bits": 4}, "up_proj": {"rank": 3}, "down_proj": {"rank": None}})
    chosen = {site.name.rpartition(".")[2]: each for site, each in make_plan(model, spec).specs.items()}
    assert [(chosen[name].bits, chosen[name].codebook, chosen[name].rank) for name in ("q_proj", "k_proj")] == [
        (4, "bt", 8),
        (2, "e8p", 2),
    ]
    assert (chosen["up_proj"].rank, chosen["gate_proj"].rank, chosen["down_proj"].rank) == (3, 8, 8)


def test_a_stack_of_experts_has_the_rank_of_one_of_them() -> None:
    config = transformers.MixtralConfig(hidden_size=256, intermediate_size=128, num_local_experts=3)
    with torch.device("meta"):
        experts = nn.Sequential(transformers.models.mixtral.modeling_mixtral.MixtralExperts(config))
    found = {site.label: spec.rank for site, spec in make_plan(experts, CompressionSpec()).specs.items()}
    assert found == {
        "0.gate_up_proj": LayerSpec().fitted((256, 256)).rank,
        "0.down_proj": LayerSpec().fitted((256, 128)).rank,
    }


def test_large_factors_are_warned_of_once_with_names_and_a_remedy(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, device="meta") for _ in range(5)))
    make_plan(model, CompressionSpec(default=LayerSpec(rank=16), patterns={"4": {"rank": 7, "bits": 4}}))
    (message,) = [record.getMessage() for record in caplog.records if "factors" in record.getMessage()]
    assert "of 4 of 5 matrices take more than a quarter of the bytes of Q, up to 50 % (0, 1, 2 and 1 more)" in message
    assert "Leave rank out, and it is chosen by the size of each; or take a smaller rank" in message


@pytest.mark.parametrize("spec", [LayerSpec(), LayerSpec(rank=7), LayerSpec(rank=0), LayerSpec(bits=4, rank=8)])
def test_factors_of_up_to_a_quarter_pass(spec: LayerSpec, caplog: pytest.LogCaptureFixture) -> None:
    make_plan(nn.Sequential(nn.Linear(256, 256, device="meta")), CompressionSpec(default=spec))
    assert not [record for record in caplog.records if "factors" in record.getMessage()]

"""Which parameters of a model are paired, and what becomes of the others."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_lrq.decomposition import compress_matrix
from hf_lrq.nn.linear import LRQLinear
from hf_lrq.optim import FactorPair, RiemannianAdamW, RiemannianSGD, factor_pairs, riemannian_param_groups
from hf_lrq.spec import LayerSpec


class Compressed(nn.Module):
    """A layer with factors, as the compressed layers hold them."""

    def __init__(self, out=7, rank=3, width=9, dtype=torch.float32, lead=()):
        super().__init__()
        self.lr_L = nn.Parameter(torch.ones(*lead, out, rank, dtype=dtype))
        self.lr_R = nn.Parameter(torch.ones(*lead, rank, width, dtype=dtype))
        self.lr_L_scale = nn.Parameter(torch.ones(rank), requires_grad=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 9)
        self.first = Compressed()
        self.experts = Compressed(lead=(4,))
        self.input_layernorm = nn.Linear(9, 9, bias=False)
        self.final = nn.LayerNorm(9)
        self.head = nn.Linear(9, 11)


def names_of(groups):
    return [(group["paired"], group["weight_decay"], group["names"]) for group in groups]


def test_compressed_layers_and_stacks_are_paired_and_the_rest_is_decayed_as_usual():
    groups = riemannian_param_groups(Model(), weight_decay=0.1)
    assert names_of(groups) == [
        (True, 0.0, ["first.lr_L", "experts.lr_L"]),
        (False, 0.1, ["embed.weight", "head.weight"]),
        (False, 0.0, ["input_layernorm.weight", "final.weight", "final.bias", "head.bias"]),
    ]
    assert [tuple(p.shape) for p in groups[0]["params"]] == [(7, 3), (3, 9), (4, 7, 3), (4, 3, 9)]


def test_every_trainable_parameter_is_in_exactly_one_group_and_the_groups_train():
    model = Model()
    model.embed.weight.requires_grad_(False)
    groups = riemannian_param_groups(model, lr=0.01, lr_ratio=4.0, factor_weight_decay=0.2)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert groups[0]["weight_decay"] == 0.2
    assert groups[0]["lr_ratio"] == 4.0
    for optimizer in (RiemannianAdamW(groups, lr=1.0), RiemannianSGD(groups, lr=1.0)):
        assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    before = model.first.lr_L.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    RiemannianAdamW(groups).step()
    assert not torch.equal(model.first.lr_L, before)


def test_adapters_that_keep_factors_in_dictionaries_are_paired_by_adapter_name():
    layer = nn.Module()
    layer.lrq_L = nn.ParameterDict({"one": torch.ones(7, 3), "two": torch.ones(7, 2), "three": torch.ones(7, 1)})
    layer.lrq_R = nn.ParameterDict({"two": torch.ones(2, 9), "one": torch.ones(3, 9)})
    layer.scaling = {"two": 0.5}
    groups = riemannian_param_groups(layer)
    assert names_of(groups) == [(True, 0.0, ["lrq_L.one"]), (True, 0.0, ["lrq_L.two"]), (False, 0.0, ["lrq_L.three"])]
    assert [group.get("scaling") for group in groups] == [1.0, 0.5, None]


def test_frozen_and_integer_factors_are_no_pairs_and_half_frozen_ones_are():
    model = nn.ModuleDict({name: Compressed() for name in ("frozen", "mixed", "codes")})
    model["frozen"].requires_grad_(False)
    model["mixed"].lr_L.requires_grad_(False)
    model["codes"].lr_L = nn.Parameter(torch.ones(7, 3, dtype=torch.int8), requires_grad=False)
    groups = riemannian_param_groups(model)
    assert names_of(groups) == [(True, 0.0, ["mixed.lr_L"]), (False, 0.0, ["codes.lr_R"])]


def test_ranks_above_both_sides_of_their_matrix_are_trained_as_plain_parameters():
    model = nn.ModuleDict({"wide": Compressed(rank=9), "wider": Compressed(rank=10)})
    groups = riemannian_param_groups(model)
    assert names_of(groups) == [(True, 0.0, ["wide.lr_L"]), (False, 0.0, ["wider.lr_L", "wider.lr_R"])]


def test_factors_that_two_modules_share_are_listed_once():
    model = nn.ModuleList([Compressed(), Compressed()])
    model[1].lr_L, model[1].lr_R = model[0].lr_L, model[0].lr_R
    assert [pair.name for pair in factor_pairs(model)] == ["0.lr_L"]


def test_one_factor_in_two_products_is_refused():
    model = nn.ModuleList([Compressed(), Compressed()])
    model[1].lr_R = model[0].lr_R
    with pytest.raises(
        ValueError, match=r"R of 1\.lr_L also belongs to 0\.lr_L; a factor can be preconditioned for one"
    ):
        riemannian_param_groups(model)


def test_a_model_without_factors_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no trainable floating-point factors under lr_L and lr_R, lrq_L"):
        riemannian_param_groups(nn.Linear(3, 3))


def test_further_pairs_and_names_of_attributes_can_be_given():
    model = nn.Module()
    model.up, model.down, model.bias = (nn.Parameter(torch.ones(*shape)) for shape in ((7, 3), (3, 9), (7,)))
    by_pair = riemannian_param_groups(model, pairs=[(model.up, model.down)])
    by_name = riemannian_param_groups(model, attributes=[("up", "down")])
    for groups, name in ((by_pair, "pairs[0]"), (by_name, "up")):
        assert names_of(groups) == [(True, 0.0, [name]), (False, 0.0, ["bias"])]
        assert [id(p) for p in groups[0]["params"]] == [id(model.up), id(model.down)]
    scaled = riemannian_param_groups(model, pairs=[FactorPair(model.up, model.down, 0.5, "mine")])
    assert (scaled[0]["scaling"], scaled[0]["names"]) == (0.5, ["mine"])
    with pytest.raises(ValueError, match=r"mine has L of shape \[3, 9\] and R of shape \[7, 3\]"):
        riemannian_param_groups(model, pairs=[FactorPair(model.down, model.up, 1.0, "mine")])


def test_the_float16_factors_of_a_real_layer_are_learned_anew_from_zero(generator):
    """Through the layer's own forward pass, to the loss that its closed-form factors had; nothing else of it moves."""
    W = torch.randn(16, 24, generator=generator)
    x = torch.randn(64, 24, generator=generator)
    spec = LayerSpec(rank=4, factor_bits=16, codebook="int", group_size=8)
    layer = LRQLinear.from_matrix(compress_matrix(W, None, spec, generator))
    solved = (layer(x) - x @ W.T).square().mean().item()
    codes = layer.weight.clone()
    layer.lr_L.data.zero_()
    layer.lr_L.requires_grad_(True)
    layer.lr_R.requires_grad_(True)
    groups = riemannian_param_groups(layer)
    assert names_of(groups) == [(True, 0.0, ["lr_L"])]
    optimizer = RiemannianAdamW(groups, lr=0.1, precond="two_sided", damping=1e-4)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - x @ W.T).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.3 * solved
    assert losses[-1] < solved
    assert torch.equal(layer.weight, codes)
    assert layer.lr_L.dtype == torch.float16


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q_proj = nn.Linear(8, 6)
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        hidden = self.conv(self.q_proj(self.embed(ids)).unsqueeze(1))
        return self.head(hidden.mean((1, 2, 3), keepdim=False)[:, None].expand(-1, 6))


def adapted(**options):
    model = Small()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["embed", "q_proj"], "modules_to_save": ["head"]}
    return get_peft_model(model, LoraConfig(**config | options))


def test_peft_adapters_of_linear_and_embedding_layers_are_paired_with_their_scaling():
    groups = riemannian_param_groups(adapted(), weight_decay=0.1)
    assert names_of(groups) == [
        (
            True,
            0.0,
            ["base_model.model.embed.lora_embedding_B.default", "base_model.model.q_proj.lora_B.default"],
        ),
        (False, 0.1, ["base_model.model.head.modules_to_save.default.weight"]),
        (False, 0.0, ["base_model.model.head.modules_to_save.default.bias"]),
    ]
    assert [tuple(p.shape) for p in groups[0]["params"]] == [(8, 2), (2, 11), (6, 2), (2, 8)]
    assert groups[0]["scaling"] == 4.0


def test_adapters_with_other_scalings_get_groups_of_their_own():
    groups = riemannian_param_groups(adapted(rank_pattern={"q_proj": 4}))
    assert [(group["scaling"], len(group["params"])) for group in groups if group["paired"]] == [(4.0, 2), (2.0, 2)]
    rank_stabilised = riemannian_param_groups(adapted(use_rslora=True))
    assert rank_stabilised[0]["scaling"] == pytest.approx(8 / 2**0.5)


def test_convolutional_adapters_and_dora_magnitudes_are_trained_as_plain_parameters():
    groups = riemannian_param_groups(adapted(target_modules=["conv", "q_proj"], use_dora=True))
    assert groups[0]["names"] == ["base_model.model.q_proj.lora_B.default"]
    plain = [name for group in groups[1:] for name in group["names"]]
    assert "base_model.model.conv.lora_A.default.weight" in plain
    assert "base_model.model.q_proj.lora_magnitude_vector.default.weight" in plain


def test_the_step_on_an_adapted_weight_does_not_depend_on_alpha():
    """alpha enters the forward pass as alpha / r; with the factors rescaled to match, training moves W alike."""
    changes = []
    for alpha, shrink in ((2, 1.0), (32, 0.25)):  # s L R = 1 * L R = 16 * (L / 4) (R / 4)
        model = adapted(lora_alpha=alpha, target_modules=["q_proj"], modules_to_save=None)
        layer = model.base_model.model.q_proj
        generator = torch.Generator().manual_seed(1)
        for factor in (layer.lora_A, layer.lora_B):
            weight = factor["default"].weight
            weight.data = shrink * torch.randn(weight.shape, generator=generator)
        before = layer.get_delta_weight("default").detach().clone()
        optimizer = RiemannianAdamW(riemannian_param_groups(model), lr=0.05, precond="two_sided")
        ids = torch.arange(10).view(2, 5)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
        changes.append(layer.get_delta_weight("default").detach() - before)
    assert changes[0].norm() > 1e-3
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-3, atol=1e-5)

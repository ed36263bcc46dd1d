"""The experimental preconditioner that knows the inputs: its rate, its formulas, and what it asks of the caller."""

import copy
import io

import peft
import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration import input_grams
from hf_lrq.decomposition import InputGram, compress_matrix
from hf_lrq.nn import LRQLinear
from hf_lrq.optim import FactorPair, RiemannianAdamW, RiemannianSGD, factor_pairs, riemannian_param_groups
from hf_lrq.optim.input_metric import InputMetric
from hf_lrq.spec import LayerSpec

SIZE, RANK = 32, 4


class Product(nn.Module):
    """A layer that is nothing but L R."""

    def __init__(self, L: Tensor, R: Tensor):
        super().__init__()
        self.lr_L, self.lr_R = (nn.Parameter(x.clone()) for x in (L, R))


def problem(condition: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """M of rank 4 and condition 10, H of the given condition and mean eigenvalue 1, and a start near M; float64."""

    def orthogonal(columns: int) -> Tensor:
        return torch.linalg.qr(torch.randn(SIZE, columns, generator=generator, dtype=torch.float64)).Q

    sigma = torch.logspace(0, -1, RANK, dtype=torch.float64)
    L, R = orthogonal(RANK) * sigma.sqrt(), (orthogonal(RANK) * sigma.sqrt()).T
    eigenvalues = torch.logspace(0, -torch.tensor(condition).log10().item(), SIZE, dtype=torch.float64)
    Q = orthogonal(SIZE)
    H = Q * (eigenvalues / eigenvalues.mean()) @ Q.T
    start = [x + 0.03 * sigma[-1] * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (L, R)]
    return L @ R, (H + H.T) / 2, *start


def steps_to_solve(condition: float, precond: str, lr: float, generator: torch.Generator, limit: int = 300) -> int:
    """Steps of gradient descent on ||(L R - M) H^½||² / 2 until that is 1e-12 of its start; `limit` if it is not."""
    M, H, L, R = problem(condition, generator)
    model = Product(L, R)
    grams = {"": H} if precond == "h_aware" else None
    groups = riemannian_param_groups(model, grams=grams, gram_damping=1e-12)
    optimizer = RiemannianSGD(groups, lr=lr, precond=precond, damping=1e-12)
    first = None
    for count in range(limit):
        optimizer.zero_grad()
        E = model.lr_L @ model.lr_R - M
        loss = ((E @ H) * E).sum() / 2
        first = loss.item() if first is None else first
        if loss.item() <= 1e-12 * first:
            return count
        loss.backward()
        optimizer.step()
    return limit


def test_the_number_of_steps_does_not_depend_on_the_condition_of_the_inputs(generator: torch.Generator) -> None:
    """Without H, the largest stable rate is one over the largest eigenvalue, and the least one decides the rest."""
    counts = [steps_to_solve(condition, "h_aware", 0.5, generator) for condition in (1, 100, 1e4)]
    assert max(counts) - min(counts) <= 2  # They start at slightly other distances.
    assert max(counts) <= 22  # 1e-12 of the loss is 1e-6 of the error: 20 halvings.
    plain = [steps_to_solve(100, "one_sided", lr, generator) for lr in (0.03, 0.1, 0.2, 0.3)]
    assert min(plain) > 3 * max(counts)
    # The control: with white inputs both are equally fast.
    assert abs(steps_to_solve(1, "one_sided", 0.5, generator) - counts[0]) <= 2


@pytest.mark.parametrize("factory", [RiemannianAdamW, RiemannianSGD])
@pytest.mark.parametrize("gram", [torch.eye(SIZE), torch.ones(SIZE)], ids=["matrix", "diagonal"])
def test_with_white_inputs_it_is_one_sided(generator: torch.Generator, factory: type, gram: Tensor) -> None:
    """To the rounding of sums that are added up in another order."""
    L, R = torch.randn(SIZE, RANK, generator=generator), torch.randn(RANK, SIZE, generator=generator)
    models = Product(L, R), Product(L, R)
    aware = factory(riemannian_param_groups(models[0], grams={"": gram}), lr=1e-2, precond="h_aware")
    plain = factory(riemannian_param_groups(models[1]), lr=1e-2, precond="one_sided")
    for _ in range(3):
        for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True):
            x.grad = torch.randn(x.shape, generator=generator)
            y.grad = x.grad.clone()
        aware.step()
        plain.step()
    assert not torch.equal(models[0].lr_L, L)
    for x, y in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("diagonal", [False, True])
def test_one_step_is_the_formula(generator: torch.Generator, diagonal: bool) -> None:
    L, R, X = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((7, 3), (3, 9), (20, 9)))
    gram = X.square().mean(0) if diagonal else X.T @ X / 20
    H = torch.diag(gram) if diagonal else gram
    H = 0.9 * H + 0.1 * H.trace() / 9 * torch.eye(9, dtype=torch.float64)
    model = Product(L, R)
    groups = riemannian_param_groups(model, grams={"": gram}, gram_damping=0.1)
    groups[0]["scaling"] = 2.0
    optimizer = RiemannianSGD(groups, lr=1.0, precond="h_aware", damping=1e-13)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    steps = [
        model.lr_L.grad @ torch.linalg.inv(4 * R @ H @ R.T),
        torch.linalg.inv(4 * L.T @ L) @ model.lr_R.grad @ torch.linalg.inv(H),
    ]
    norm = sum((p.grad * step).sum() for p, step in zip(model.parameters(), steps, strict=True)).sqrt()
    torch.testing.assert_close(optimizer.projected_grad_norm(), norm)
    optimizer.step()
    torch.testing.assert_close([model.lr_L, model.lr_R], [nn.Parameter(L - steps[0]), nn.Parameter(R - steps[1])])


def test_the_unit_of_the_inputs_does_not_matter(generator: torch.Generator) -> None:
    """W for inputs in other units takes the step of W, in those units."""
    M, H, L, R = problem(100, generator)
    moved = []
    for c in (1.0, 1e3):
        model = Product(L, R / c)
        optimizer = RiemannianSGD(riemannian_param_groups(model, grams={"": c * c * H}), lr=0.5, precond="h_aware")
        E = (model.lr_L @ model.lr_R - M / c).detach() @ (c * c * H)
        model.lr_L.grad, model.lr_R.grad = E @ model.lr_R.detach().T, model.lr_L.detach().T @ E
        optimizer.step()
        moved.append(c * (model.lr_L @ model.lr_R).detach())
    torch.testing.assert_close(moved[0], moved[1])


# --- layers whose factors stand between rotations


def compressed_layer(generator: torch.Generator) -> LRQLinear:
    spec = LayerSpec(rank=3, factor_bits=16, codebook="int", bits=4, group_size=8, rounding="nearest", init="zero")
    return LRQLinear.from_matrix(compress_matrix(torch.randn(16, 24, generator=generator), None, spec, generator))


def test_factors_between_rotations_get_the_gram_of_what_they_meet(generator: torch.Generator) -> None:
    layer = compressed_layer(generator)
    assert layer.rot_in is not None
    x = torch.randn(50, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    H = x.T @ x / 50
    # Through R alone: |z Rᵀ|² over all inputs is tr(R H_z Rᵀ), and x reaches R as z. `unrotated` says so, too.
    _, R_outside = layer.unrotated(torch.zeros(16, 5), torch.eye(24)[:5])
    expected = R_outside @ H @ R_outside.T
    torch.testing.assert_close(layer.factor_gram(H)[:5, :5], expected, rtol=1e-4, atol=1e-4 * H.abs().max().item())


def model_with_two_layers(generator: torch.Generator) -> nn.Module:
    model = nn.Module()
    model.up, model.down = compressed_layer(generator), nn.Linear(16, 24)
    model.forward = lambda input_ids: model.down(model.up(nn.functional.one_hot(input_ids, 24).float()))
    return model


def test_grams_are_measured_where_the_layers_get_their_inputs(generator: torch.Generator) -> None:
    model = model_with_two_layers(generator)
    batches = [torch.tensor([[1, 1, 2]]), {"input_ids": torch.tensor([[3, 5]]), "attention_mask": torch.ones(1, 2)}]
    model.forward = lambda input_ids, attention_mask=None: model.up(nn.functional.one_hot(input_ids, 24).float())
    grams = input_grams(model, batches)
    assert list(grams) == ["up"]
    assert grams["up"].n_tokens == 5
    assert grams["up"].H.diagonal()[:6].tolist() == pytest.approx([0, 0.4, 0.2, 0.2, 0, 0.2])
    assert not model.up._forward_pre_hooks


@pytest.mark.parametrize("kind", ["bare", "lora", "lora again"])
def test_grams_are_found_by_the_names_of_the_modules(generator: torch.Generator, kind: str) -> None:
    layer = nn.Sequential(compressed_layer(generator))
    grams = {"0": InputGram.from_inputs(torch.randn(99, 24, generator=generator))}
    if kind == "bare":
        layer[0].lr_L.requires_grad_(True)
        model, expected = layer, layer[0].factor_gram(grams["0"].H)
    else:
        model = peft.get_peft_model(layer, peft.LoraConfig(r=2, target_modules=["0"]))
        expected = grams["0"].H  # A pair outside of the rotations.
        if kind == "lora again":
            grams = {f"base_model.model.{name}": gram for name, gram in grams.items()}
    (group,) = (group for group in riemannian_param_groups(model, grams=grams, gram_damping=1e-6) if group["paired"])
    torch.testing.assert_close(group["metrics"][0].H, expected, rtol=1e-4, atol=1e-5)
    RiemannianAdamW([group], precond="h_aware")


# --- what is kept


def optimizer_for(model: nn.Module, grams: dict[str, Tensor] | None) -> RiemannianAdamW:
    precond = "one_sided" if grams is None else "h_aware"
    return RiemannianAdamW(riemannian_param_groups(model, grams=grams), lr=1e-2, precond=precond)


def train(model: nn.Module, optimizer: RiemannianAdamW, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_grams_are_no_part_of_the_state_and_a_resumed_run_goes_on_exactly(generator: torch.Generator) -> None:
    L, R, x = (torch.randn(s, generator=generator) for s in ((40, 2), (2, 50), (99, 50)))
    grams = {"": x.T @ x / 99}
    model = Product(L, R)
    optimizer = optimizer_for(model, grams)
    assert "metrics: [InputMetric[50, 50]]" in repr(optimizer)
    train(model, optimizer, 0, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert len(file.getvalue()) < 4 * 50 * 50
    twin, pickled = copy.deepcopy(model), copy.deepcopy(optimizer)  # Copies hold their Grams.
    assert pickled.param_groups[0]["metrics"][0].H.shape == (50, 50)
    resumed = optimizer_for(twin, grams)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer, 2, 2)
    train(twin, resumed, 2, 2)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_state_for_grams_is_not_loaded_without_them(generator: torch.Generator) -> None:
    L, R = torch.randn(7, 2, generator=generator), torch.randn(2, 9, generator=generator)
    with_grams, without = (optimizer_for(Product(L, R), grams) for grams in ({"": torch.eye(9)}, None))
    with pytest.raises(ValueError, match=r"Group 0 has no Grams, in the saved state it has precond='h_aware'"):
        without.load_state_dict(with_grams.state_dict())
    with pytest.raises(ValueError, match=r"Group 0 has Grams, in the saved state it has precond='one_sided'"):
        with_grams.load_state_dict(without.state_dict())
    assert without.param_groups[0]["precond"] == "one_sided"


# --- what is refused


def broken(at: tuple[int, int], value: float) -> Tensor:
    H = torch.eye(9)
    H[at] = value
    return H


@pytest.mark.parametrize(
    ("grams", "message"),
    [
        ({}, r"first\.lr_L has no Gram: `grams` has no 'first'\. It has 0 entries: none"),
        ({"frist": torch.eye(9)}, r"`grams` has no 'first'\. Did you mean 'frist'\?"),
        ({"first": torch.eye(7)}, r"The Gram for first\.lr_L has shape \[7, 7\]; its R takes inputs of width 9"),
        ({"first": torch.ones(9, 1)}, r"which need \[9, 9\], or \[9\] for the diagonal"),
        ({"first": broken((2, 3), torch.nan)}, r"The Gram for first\.lr_L is not finite"),
        ({"first": broken((2, 3), 0.5)}, "is not symmetric"),
        ({"first": broken((4, 4), -0.5)}, r"is not positive semi-definite: its least eigenvalue is -0\.5\."),
        ({"first": broken((4, 4), -0.5).diagonal()}, r"is not positive semi-definite: it has -0\.5 on its diagonal"),
        ({"first": torch.zeros(9, 9)}, "is zero"),
    ],
)
def test_a_gram_that_is_missing_or_none_is_refused(grams: dict[str, Tensor], message: str) -> None:
    model = nn.ModuleDict({"first": Product(torch.ones(7, 3), torch.ones(3, 9))})
    with pytest.raises(ValueError, match=message):
        riemannian_param_groups(model, grams=grams)


def test_a_gram_of_few_inputs_is_accepted(generator: torch.Generator) -> None:
    """It is singular, and in float32 its least eigenvalues come to lie below zero."""
    x = torch.randn(5, 64, generator=generator)
    H = x.T @ x / 5
    assert torch.linalg.eigvalsh(H)[0] < 0
    metric = InputMetric.of(H, 64)
    torch.testing.assert_close(metric.H @ metric.inverse, torch.eye(64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("damping", [0.0, -1e-2, 1.5, torch.nan])
def test_damping_of_grams_is_a_fraction(damping: float) -> None:
    with pytest.raises(ValueError, match=r"gram_damping is .*; it must be above 0 and at most 1"):
        riemannian_param_groups(
            Product(torch.ones(7, 3), torch.ones(3, 9)), grams={"": torch.eye(9)}, gram_damping=damping
        )


def test_a_damping_below_the_rounding_of_a_gram_is_refused() -> None:
    H = torch.eye(64)
    H[5, 5] = -5e-7
    with pytest.raises(ValueError, match=r"gram_damping=1e-09 is too small to make up for rounding there; take 0\.01"):
        InputMetric.of(H, 64, 1e-9)


def test_the_flag_and_the_grams_come_together() -> None:
    model = Product(torch.ones(7, 3), torch.ones(3, 9))
    with pytest.raises(ValueError, match=r"needs the Gram of the inputs of each of 1 pairs, got none\. Pass `grams`"):
        RiemannianAdamW(riemannian_param_groups(model), precond="h_aware")
    with pytest.raises(ValueError, match=r"Grams are given, but precond='two_sided' has no use for them"):
        RiemannianAdamW(riemannian_param_groups(model, grams={"": torch.eye(9)}), precond="two_sided")
    other = FactorPair(torch.ones(5, 2), torch.ones(2, 9), name="mine")
    groups = riemannian_param_groups(model, grams={"": torch.eye(9)}, pairs=[other])
    with pytest.raises(ValueError, match=r"Pair 1 \(mine\) has no Gram; give its FactorPair a `metric`"):
        RiemannianAdamW(groups, precond="h_aware")
    metric = InputMetric.of(torch.eye(8), 8)
    with pytest.raises(ValueError, match=r"Pair 0 has an R of width 9, but a Gram of width 8"):
        RiemannianAdamW([{"params": list(model.parameters()), "paired": True, "metrics": [metric]}], precond="h_aware")


def test_stacks_of_experts_are_refused() -> None:
    model = Product(torch.ones(4, 7, 3), torch.ones(4, 3, 9))
    assert len(factor_pairs(model)) == 1
    with pytest.raises(ValueError, match="is a stack of products"):
        riemannian_param_groups(model, grams={"": torch.eye(9)})

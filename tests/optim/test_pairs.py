"""Groups that cannot be trained are refused when they are made, and a former name of an option is still read."""

import pytest
import torch

from hf_lrq.optim import RiemannianAdamW, RiemannianSGD


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([empty(7, 3), empty(3, 9), empty(7, 3)], r"A paired group has 3 parameters, but pairs are listed as L0, R0"),
        (
            [empty(7, 3), empty(3, 9), empty(7, 3), empty(4, 9)],
            r"Pair 1 has L of shape \[7, 3\] and R of shape \[4, 9\]; the product needs L \[\.\.\., out, r\]",
        ),
        ([empty(2, 7, 3), empty(3, 9)], r"Pair 0 has L of shape \[2, 7, 3\] and R of shape \[3, 9\]"),
        ([empty(3, 9), empty(9, 3)], r"rank 9 is larger than both sides of the product\. If the two are swapped"),
        ([empty(7), empty(3, 9)], r"at least two dimensions.*use precondition_gradients"),
        ([empty(7, 3, dtype=torch.int8), empty(3, 9)], r"Pair 0 has factors of torch\.int8 and torch\.float32"),
        ([empty(7, 3), torch.empty(3, 9, device="meta")], r"Pair 0 has L on cpu and R on meta"),
    ],
)
@pytest.mark.parametrize("factory", [RiemannianAdamW, RiemannianSGD])
def test_factors_that_do_not_pair_up_are_refused_when_the_group_is_added(factory, params, message):
    with pytest.raises(ValueError, match=message):
        factory([{"params": params, "paired": True}])
    optimizer = factory([empty(2)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params, "paired": True})
    assert len(optimizer.param_groups) == 1


def test_names_appear_in_the_message():
    with pytest.raises(ValueError, match=r"Pair 0 \(q_proj\) has L"):
        RiemannianAdamW([{"params": [empty(7, 3), empty(4, 9)], "paired": True, "names": ["q_proj"]}])
    with pytest.raises(ValueError, match=r"Pair 0 \(q\.L, q\.R\) has L"):
        RiemannianAdamW([{"params": [("q.L", empty(7, 3)), ("q.R", empty(4, 9))], "paired": True}])
    with pytest.raises(ValueError, match=r"2 names for 1 pairs"):
        RiemannianAdamW([{"params": [empty(7, 3), empty(3, 9)], "paired": True, "names": ["a", "b"]}])


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (RiemannianAdamW, {"damping": 0.0}, r"damping is 0\.0; it must be positive: a fraction of the mean eigenvalue"),
        (RiemannianSGD, {"damping": -1e-6}, r"damping is -1e-06; it must be positive"),
        (RiemannianSGD, {"refresh": 0}, "refresh is 0; it must be an integer, at least 1"),
        (RiemannianAdamW, {"refresh": 2.0}, r"refresh is 2\.0; it must be an integer"),
        (RiemannianAdamW, {"lr": -1.0}, r"lr is -1\.0; it must be a number, at least 0"),
        (RiemannianAdamW, {"betas": (0.9, 1.0)}, r"betas is \(0\.9, 1\.0\); it must be two numbers in \[0, 1\)"),
        (RiemannianAdamW, {"eps": -1e-8}, "eps is -1e-08"),
        (RiemannianAdamW, {"weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0"),
        (RiemannianAdamW, {"lr_ratio": 0}, "lr_ratio is 0; it must be positive"),
        (RiemannianAdamW, {"trust": 0.0}, r"trust is 0\.0; it must be positive, or None"),
        (RiemannianSGD, {"clip_projected": 0}, "clip_projected is 0; it must be positive, or None"),
        (RiemannianSGD, {"momentum": 1.0}, r"momentum is 1\.0; it must be in \[0, 1\)"),
        (RiemannianSGD, {"nesterov": True}, "nesterov=True needs a momentum"),
        (
            RiemannianAdamW,
            {"precond": "twosided"},
            r"Unknown precond 'twosided'\. Known: one_sided, two_sided, h_aware, none\.",
        ),
        (RiemannianSGD, {"precond": "two_sided"}, r"Unknown precond 'two_sided'\. Known: one_sided, h_aware, none\."),
    ],
)
def test_impossible_options_are_refused(factory, options, message):
    with pytest.raises(ValueError, match=message):
        factory([empty(2)], **options)


def test_a_group_may_have_its_own_options_and_they_are_checked():
    with pytest.raises(ValueError, match=r"scaling is 0\.0; it must be a finite number other than 0"):
        RiemannianAdamW([{"params": [empty(7, 3), empty(3, 9)], "paired": True, "scaling": 0.0}])


@pytest.mark.parametrize("factory", [RiemannianAdamW, RiemannianSGD])
def test_the_former_name_of_the_one_sided_preconditioner_is_read(factory):
    for groups in ([{"params": [empty(7, 3), empty(3, 9)], "paired": True}], [empty(2)]):
        optimizer = factory(groups, precond="pre")
        optimizer.add_param_group({"params": [empty(3)]})
        optimizer.add_param_group({"params": [empty(4)], "precond": "pre"})
        assert {group["precond"] for group in optimizer.param_groups} == {"one_sided"}
        assert optimizer.defaults["precond"] == "one_sided"

"""What rounding a table does to what a model says, measured on its own modules."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lrq.calibration.capture import ModelRunner
from hf_lrq.calibration.tables import table_losses
from hf_lrq.decomposition import compress_matrix, generator_for
from hf_lrq.errors import CalibrationError
from hf_lrq.spec import CompressionSpec
from hf_lrq.work import EmbeddingSite, HeadSite, Inline, Site, Threads
from hf_lrq.work.menus import Menu

VOCABULARY, WIDTH = 48, 32
SPECS = (*(CompressionSpec().for_table("embed", bits) for bits in (8, 6, 4)), None)


class Bigrams(nn.Module):
    """The next token from the last one."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(self.inner(self.embed(input_ids)).relu())}


def bigrams(tied: bool, generator: torch.Generator) -> Bigrams:
    with torch.random.fork_rng(devices=[]):
        model = Bigrams(tied).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    return model


def sites(model: Bigrams) -> list[Site]:
    tied = model.head.weight is model.embed.weight
    embedding = EmbeddingSite.tied("embed", model.embed, {"head": model.head} if tied else {})
    assert embedding is not None
    return [embedding] if tied else [embedding, *HeadSite.of("head", model.head)]


def measured(model: Bigrams, batches: list[Any], workers: Any = None) -> list[list[float]]:
    menus = [Menu((site,), SPECS) for site in sites(model)]
    return table_losses(model, menus, ModelRunner(model, batches), workers or Inline(), 0)


@pytest.fixture
def batches(generator: torch.Generator) -> list[Tensor]:
    return [torch.randint(0, VOCABULARY, (2, 40), generator=generator) for _ in range(4)]


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_divergence_of_the_model_with_that_table(
    tied: bool, batches: list[Tensor], generator: torch.Generator, rng_untouched: None
) -> None:
    model = bigrams(tied, generator)
    before, weights = copy.deepcopy(model), [id(parameter) for parameter in model.parameters()]
    found = measured(model, batches)
    assert [id(parameter) for parameter in model.parameters()] == weights
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before.parameters(), strict=True))
    tokens = torch.cat(batches)
    with torch.no_grad():
        for site, row in zip(sites(model), found, strict=True):
            assert row[3] == 0 < row[0] < row[1] < row[2]
            for spec, loss in zip(SPECS[:3], row, strict=False):
                assert spec is not None
                changed, module = copy.deepcopy(model), model.get_submodule(site.name)
                weight = module.get_parameter("weight")
                rounded = compress_matrix(weight, None, spec, generator_for(0, site.label)).dense()
                changed.get_submodule(site.name).get_parameter("weight").copy_(rounded)
                p, q = (one(tokens)["logits"].double().log_softmax(-1) for one in (model, changed))
                assert loss == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def test_threads_and_padding_change_nothing(batches: list[Tensor], generator: torch.Generator) -> None:
    model = bigrams(True, generator)
    padded = [
        {
            "input_ids": torch.cat([batch, torch.zeros_like(batch)], 1),
            "attention_mask": torch.cat([torch.ones_like(batch), torch.zeros_like(batch)], 1),
        }
        for batch in batches
    ]
    with Threads(2) as workers:
        assert measured(model, batches, workers) == measured(model, batches)
    torch.testing.assert_close(torch.tensor(measured(model, padded)), torch.tensor(measured(model, batches)))


def test_of_an_encoder_it_is_half_of_the_squared_distance(batches: list[Tensor], generator: torch.Generator) -> None:
    """As random cotangents have it, whose squared product with an error is its squared length in the mean."""

    class Encoder(Bigrams):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return (super().forward(input_ids)["logits"],)

    with torch.random.fork_rng(devices=[]):
        model = Encoder(True).eval()
    model.load_state_dict(bigrams(True, generator).state_dict())
    spec = SPECS[2]
    assert spec is not None
    changed = copy.deepcopy(model)
    changed.embed.weight.data = compress_matrix(model.embed.weight, None, spec, generator_for(0, "embed")).dense()
    changed.head.weight = changed.embed.weight
    with torch.no_grad():
        difference = model(torch.cat(batches))[0] - changed(torch.cat(batches))[0]
    assert measured(model, batches)[0][2] == pytest.approx(difference.square().sum(-1).mean().item() / 2, rel=1e-3)


def test_what_is_not_finite_is_named(batches: list[Tensor], generator: torch.Generator) -> None:
    model = bigrams(True, generator)
    model.inner.weight.data.fill_(torch.inf)
    with pytest.raises(CalibrationError, match="what the model says of calibration batch 0 holds NaN or Inf"):
        measured(model, batches)

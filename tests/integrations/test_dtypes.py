"""The dtype of a compressed model is that of what is not compressed, also where a compressed layer comes first."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_lrq import LRQConfig, compress
from hf_lrq.nn import LRQLinear


class OddConfig(transformers.PretrainedConfig):
    model_type = "odd_dtype"


class Inner(transformers.PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config: OddConfig):
        super().__init__(config)
        self.first = nn.Linear(32, 32, bias=False)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x.to(self.dtype))


class Odd(Inner):
    def __init__(self, config: OddConfig):
        super().__init__(config)
        self.inner = Inner(config)
        self.last = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(super().forward(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_that_comes_first_does_not_decide(dtype: torch.dtype, fast: dict[str, Any], tmp_path: Path) -> None:
    model = Odd(OddConfig(dtype=dtype)).to(dtype).eval()
    compress(model, None, LRQConfig(**fast))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    y = model(x)
    model.save_pretrained(tmp_path)
    again = Odd.from_pretrained(tmp_path)
    assert isinstance(again.first, LRQLinear)
    assert next(parameter.dtype for parameter in again.parameters() if parameter.is_floating_point()) == torch.float16
    for one in (model, again):
        assert one.dtype == y.dtype == dtype
        assert str(one.config.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
        # Nothing of it is left as it was.
        assert one.inner.dtype == dtype
    assert torch.equal(again(x), y)
    assert model.double().dtype == torch.float64


def test_models_without_compressed_layers_are_as_they_were() -> None:
    ordinary = transformers.PreTrainedModel.dtype.fget.__wrapped__
    model = Odd(OddConfig())
    model.inner.first.half()
    assert model.dtype == ordinary(model) == torch.float32
    assert model.inner.dtype == ordinary(model.inner) == torch.float16

"""Layers of random codes: for benchmarks and tests, where speed and shapes count and values do not."""

import torch

from hf_lrq.layout import LayerLayout
from hf_lrq.nn.linear import LRQLinear


def random_layer(
    in_features: int,
    out_features: int,
    layout: LayerLayout,
    *,
    bias: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> LRQLinear:
    """A layer of random codes, scales and factors, with outputs about as large as the inputs.

    As in compressed models, layers of one input width share rot_in (those of one seed here).

    Args:
        in_features, out_features, bias, layout, dtype: see `LRQLinear`.
        seed: for all of it; the global random state is not touched.
    """
    layer = LRQLinear(in_features, out_features, bias, layout, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in layer.named_parameters():
        data = parameter.data
        if name in ("rot_in", "rot_out"):
            own = torch.Generator().manual_seed(seed) if name == "rot_in" else generator
            data.copy_(torch.randint(0, 2, data.shape, generator=own) * 2 - 1)
        elif name.endswith("_scale"):  # A product of codes up to 127 in both factors.
            data.fill_((127 * in_features) ** -0.5 / 8)
        elif not data.is_floating_point():
            low, high = (-127, 128) if data.dtype == torch.int8 else (0, 256)
            data.copy_(torch.randint(low, high, data.shape, generator=generator))
        elif name == "scales":
            data.copy_((1 + torch.rand(data.shape, generator=generator)) * in_features**-0.5)
        else:
            data.copy_(torch.randn(data.shape, generator=generator) * in_features**-0.5)
    return layer

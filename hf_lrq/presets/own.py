"""Ours: today's defaults, a quick one, and the best."""

from hf_lrq.options import LayerOptions, ModuleOptions, options_of
from hf_lrq.presets.base import Preset

_DEFAULTS = {name: item.default for name, item in options_of(LayerOptions).items()}
_DEFAULTS["embedding_bits"] = options_of(ModuleOptions)["embedding_bits"].default

OWN = (
    Preset(
        name="lrq",
        what="What this package does if nothing else is said, written out.",
        options=_DEFAULTS,
        data="useful",
    ),
    Preset(
        name="lrq_fast",
        what="One iteration, two refinements and no sweeps: less than half the time of lrq, and nearly its error.",
        options={"iters": 1, "refinements": 2, "sweeps": 0},
        data="useful",
    ),
    Preset(
        name="lrq_best",
        what="More iterations than lrq, errors weighed by what they do to the predictions, and a recovery at the end.",
        options={"init": "auto", "iters": 12, "refinements": 8, "sweeps": 2, "two_sided": True},
        data="needed",
        gradients=True,
        recover=True,
    ),
)
